import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ddpm_tf.data.picture import fit
from ddpm_tf.data.sources import load_source
from ddpm_tf.errors import InputError


class PaintedShapes(tfds.core.GeneratorBasedBuilder):
    """A data set of 6 images, prepared on the spot."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=6)}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({**features, "id": tfds.features.Text()})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(6):
            yield k, {"image": np.full((8, 8, 3), k, np.uint8), "label": k, "id": str(k)}


@pytest.mark.parametrize(("file_format", "in_memory_mb"), [("tfrecord", 10), ("array_record", 0)])
def test_tfds_by_name_in_memory_and_by_random_access(tmp_path, file_format, in_memory_mb):
    PaintedShapes(data_dir=tmp_path, file_format=file_format).download_and_prepare()
    name = PaintedShapes.name
    options = {"image_shape": (8, 8, 3), "data_dir": str(tmp_path), "in_memory_mb": in_memory_mb}
    source = load_source(f"tfds:{name}", **options)
    batch = source.read(np.arange(6))
    assert set(batch) == {"image", "label"} and source.num_examples == 6
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    np.testing.assert_array_equal(np.sort(batch["label"]), np.arange(6))
    np.testing.assert_array_equal(source.read(np.array([4]))["label"], batch["label"][4:5])
    with pytest.raises(InputError, match="no split 'test', only"):
        load_source(f"tfds:{name}", split="test", **options)


def test_tfds_without_random_access_says_what_to_do(tmp_path):
    PaintedShapes(data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    with pytest.raises(InputError, match="--file_format=array_record"):
        load_source(f"tfds:{PaintedShapes.name}", image_shape=(8, 8, 3), data_dir=str(tmp_path), in_memory_mb=0)


def test_a_download_that_fails_is_one_message(tmp_path, monkeypatch):
    def fail(self):
        raise ConnectionError("no network")

    def find(host, port):
        if not is_found:
            raise OSError(f"unknown host {host}")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    monkeypatch.setattr(socket, "getaddrinfo", find)
    is_found = False
    with pytest.raises(InputError, match="'mnist' cannot be downloaded: no address of .*Is there a network"):
        load_source("tfds:mnist", image_shape=(28, 28, 1), data_dir=str(tmp_path), download=True)
    is_found = True
    with pytest.raises(InputError, match="'mnist' cannot be downloaded and prepared: no network"):
        load_source("tfds:mnist", image_shape=(28, 28, 1), data_dir=str(tmp_path), download=True)
    with pytest.raises(InputError, match="There is no TFDS data set 'mnist:99.0.0'"):
        load_source("tfds:mnist:99.0.0", image_shape=(28, 28, 1), data_dir=str(tmp_path))


def test_tfds_that_is_not_prepared_gives_the_command(tmp_path):
    with pytest.raises(InputError, match=f"tfds build mnist --data_dir={tmp_path}"):
        load_source("tfds:mnist", image_shape=(28, 28, 1), data_dir=str(tmp_path))
    with pytest.raises(InputError, match="There is no TFDS data set 'minst'"):
        load_source("tfds:minst", image_shape=(28, 28, 1), data_dir=str(tmp_path))


def stored(folder, features, rows, name="stored"):
    """A data set of any features, prepared on the spot."""
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        data_dir=str(folder),
        split_datasets={"train": list(enumerate(rows))},
        features=tfds.features.FeaturesDict(features),
    )
    return {"name": f"tfds:{name}", "data_dir": str(folder)}


def test_images_of_varying_size_are_cut_and_shrunk(tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))
    images = [rng.integers(0, 256, (8 + k, 16 - k, 3), np.uint8) for k in range(5)]
    where = stored(tmp_path, {"image": tfds.features.Image(shape=(None, None, 3))}, [{"image": x} for x in images])
    source = load_source(**where, image_shape=(8, 8, 3))
    found = {image.tobytes() for image in source.tensors["image"].numpy()}  # TFDS shuffles when it stores
    assert found == {fit(image, (8, 8, 3)).tobytes() for image in images}
    assert load_source(**where, image_shape=(4, 4, 1)).image_shape == (4, 4, 1)
    with pytest.raises(InputError, match="8x16 pixels|9x15 pixels.*expected at least 12x12"):
        load_source(**where, image_shape=(12, 12, 3))


def test_text_labels_are_classes_and_splits_are_sliced(tmp_path):
    features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.Text()}
    rows = [{"image": np.full((8, 8, 3), k, np.uint8), "label": f"kind{k % 3}"} for k in range(6)]
    where = stored(tmp_path, features, rows, "texts")
    source = load_source(**where, image_shape=(8, 8, 3))
    assert source.details.class_names == ["kind0", "kind1", "kind2"]
    np.testing.assert_array_equal(source.tensors["label"], source.tensors["image"][:, 0, 0, 0].numpy() % 3)
    half = load_source(**where, image_shape=(8, 8, 3), split="train[:50%]")
    np.testing.assert_array_equal(half.tensors["image"], source.tensors["image"][:3])
    with pytest.raises(InputError, match="no split 'train.:50z.', only .*or a part of one"):
        load_source(**where, image_shape=(8, 8, 3), split="train[:50z]")
    with pytest.raises(InputError, match="no examples"):
        load_source(**where, image_shape=(8, 8, 3), split="train[:0]")


def test_array_records_that_fit_in_memory_are_read(tmp_path):
    PaintedShapes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = load_source(f"tfds:{PaintedShapes.name}", image_shape=(8, 8, 3), data_dir=str(tmp_path))
    np.testing.assert_array_equal(source.tensors["image"][:, 0, 0, 0], source.tensors["label"])


@pytest.mark.parametrize(
    ("features", "row", "message"),
    [
        (
            {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.Sequence(np.int64)},
            {"image": np.zeros((8, 8, 3), np.uint8), "label": [1, 2]},
            r"'label' .* is .*int64.* \[None\]; expected one class per image",
        ),
        (
            {"image": tfds.features.Tensor(shape=(8, 8, 3), dtype=np.float32)},
            {"image": np.zeros((8, 8, 3), np.float32)},
            "'image' .* expected uint8 images",
        ),
        ({"x": np.int64}, {"x": 1}, "has no 'image' feature"),
    ],
)
def test_features_that_are_no_labelled_images_are_refused(tmp_path, features, row, message):
    where = stored(tmp_path, features, [row])
    with pytest.raises(InputError, match=message):
        load_source(**where, image_shape=(8, 8, 3))


@pytest.mark.parametrize("name", ["huggingface:mnist", "kaggle:x", "a:b", "mnist/nope", "../../etc", "", "mnist\nx"])
def test_names_that_are_none_are_refused_in_one_line(tmp_path, name):
    with pytest.raises(InputError, match="^[^\n]*(There is no TFDS data set|another package)[^\n]*\n"):
        load_source(f"tfds:{name}", image_shape=(8, 8, 3), data_dir=str(tmp_path))
