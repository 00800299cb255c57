"""The promises of `contract.Source`, kept by every entry of SOURCES, and `load_source` itself."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from ddpm_tf.data.manifest import manifest
from ddpm_tf.data.sources import SOURCES, load_source
from ddpm_tf.errors import DataNotFoundError, InputError
from tests.data.test_cifar import write_cifar
from tests.data.test_idx import write_idx
from tests.data.test_tfds import PaintedShapes
from tests.data.test_tfrecords import example, write

SHAPE = (8, 8, 3)
IMAGES = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (6, *SHAPE), np.uint8)


def make_folder(folder, in_memory_mb):
    for k, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{k}.png")
    return f"folder:{folder}", {}


def make_npz(folder, in_memory_mb):
    np.savez(folder / "a.npz", images=IMAGES, labels=np.arange(6))
    return f"npz:{folder}/a.npz", {}


def make_tfds(folder, in_memory_mb):
    """TFDS reads array_record files by number only, and tfrecord files from the beginning only."""
    file_format = "tfrecord" if in_memory_mb else "array_record"
    PaintedShapes(data_dir=folder / file_format, file_format=file_format).download_and_prepare()
    return f"tfds:{PaintedShapes.name}", {"data_dir": str(folder / file_format)}


def make_tfrecord(folder, in_memory_mb):
    for name, images in (("a", IMAGES[:4]), ("b", IMAGES[4:])):
        write(folder / f"{name}.tfrecords", [example(image) for image in images])
    return f"tfrecord:{folder}", {}


def make_idx(folder, in_memory_mb):
    write_idx(folder / "train-images-idx3-ubyte.gz", IMAGES[..., 0])
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(6, dtype=np.uint8))
    return f"idx:{folder}", {"image_shape": (8, 8, 1)}


def make_cifar(classes):
    def make(folder, in_memory_mb):
        write_cifar(folder, classes, {"train": 3, "test": 2})
        return f"cifar{classes}:{folder}", {"image_shape": (32, 32, 3)}

    return make


MAKE = {
    "idx": make_idx,
    "cifar10": make_cifar(10),
    "cifar100": make_cifar(100),
    "digits": lambda folder, in_memory_mb: ("digits", {"image_shape": (8, 8, 1)}),
    "folder": make_folder,
    "npz": make_npz,
    "tfds": make_tfds,
    "tfrecord": make_tfrecord,
}


@pytest.fixture(params=SOURCES)
def load(request, tmp_path):
    """A function (in_memory_mb) -> a small source, for every entry of SOURCES."""

    def load(in_memory_mb):
        name, options = MAKE[request.param](tmp_path, in_memory_mb)
        return load_source(name, in_memory_mb=in_memory_mb, **{"image_shape": SHAPE, **options})

    return load


@pytest.mark.parametrize("in_memory_mb", [0, 64])
def test_a_source_keeps_the_promises(load, in_memory_mb):
    source = load(in_memory_mb)
    n, (height, width, channels) = source.num_examples, source.image_shape
    assert n >= 1 and isinstance(source.image_shape, tuple)
    for name, size in source.files:
        assert isinstance(name, str) and not os.path.isabs(name) and size > 0
    examples = {key: tensor.numpy() for key, tensor in source.read(np.arange(n)).items()}
    assert examples["image"].dtype == np.uint8 and examples["image"].shape == (n, height, width, channels)
    if "label" in examples:
        assert examples["label"].dtype == np.int32 and examples["label"].shape == (n,)
    assert examples.keys() <= {"image", "label"}

    indices = np.array([n - 1, 0, 0])  # in any order, repeated
    batches = [source.read(indices), load(in_memory_mb).read(indices)]  # and numbered alike at the next start
    calls = tf.data.Dataset.from_tensors(tf.constant(indices)).repeat(8)
    batches += calls.map(source.read, num_parallel_calls=4)  # in a pipeline, by several threads
    for batch in batches:
        assert batch.keys() == examples.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], examples[key][indices])


def test_a_source_is_the_same_in_memory_and_not(load):
    held, streamed = load(64), load(0)
    assert held.num_examples == streamed.num_examples
    a, b = (source.read(np.arange(source.num_examples)) for source in (held, streamed))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
    for source in (held, streamed):
        assert json.loads(json.dumps(manifest(source))) == manifest(source)


def test_unknown_sources_and_other_shapes_are_refused():
    with pytest.raises(InputError, match="Unknown data source 'digit'; expected one of .*'digits'"):
        load_source("digit", image_shape=(8, 8, 1))
    with pytest.raises(InputError, match=r"(?s)have shape \[8, 8, 1\], expected \[16, 16, 1\].*data.image_size"):
        load_source("digits", image_shape=(16, 16, 1))


@pytest.mark.parametrize("kind", sorted(SOURCES.keys() - {"digits", "tfds"}))
def test_data_that_are_missing_are_named_with_the_field(kind, tmp_path):
    with pytest.raises(DataNotFoundError, match=f"(?s)none.*data.source='{kind}:{tmp_path}/none'"):
        load_source(f"{kind}:{tmp_path}/none", image_shape=SHAPE)


@pytest.mark.parametrize("kind", sorted(SOURCES.keys() - {"digits", "tfds", "folder"}))
def test_a_pipe_is_refused_and_not_waited_for(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a named pipe, not a file"):
        load_source(f"{kind}:{tmp_path}/pipe", image_shape=SHAPE)


def test_a_setting_of_another_kind_is_refused():
    with pytest.raises(InputError, match="range is a setting of the data source npz; folder has no such setting"):
        load_source("folder:x", image_shape=SHAPE, range="0..1")
    with pytest.raises(InputError, match="data.convert is 'atuo'; expected one of auto, strict"):
        load_source("folder:x", image_shape=SHAPE, convert="atuo")
    with pytest.raises(InputError, match="digits takes no argument"):
        load_source("digits:8", image_shape=(8, 8, 1))
