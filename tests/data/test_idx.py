import gzip
from pathlib import Path

import numpy as np
import pytest

from ddpm_tf.data.sources import load_source
from ddpm_tf.errors import InputError

IMAGES = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (5, 6, 4), np.uint8)
SHAPE = (6, 4, 1)


def write_idx(path, array, *, kind=8):
    head = bytes([0, 0, kind, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = head + array.tobytes()
    Path(path).write_bytes(gzip.compress(content) if str(path).endswith(".gz") else content)


def test_a_folder_of_mnist_files_is_read_by_split(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", IMAGES)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    write_idx(tmp_path / "t10k-images.idx3-ubyte", IMAGES[:2])  # as some programs name it
    source = load_source(f"idx:{tmp_path}", image_shape=SHAPE)
    np.testing.assert_array_equal(source.tensors["image"][..., 0], IMAGES)
    np.testing.assert_array_equal(source.tensors["label"], np.arange(5))
    assert [name for name, _ in source.files] == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    test = load_source(f"idx:{tmp_path}", image_shape=SHAPE, split="test")
    assert test.num_examples == 2 and "label" not in test.tensors
    one = load_source(f"idx:{tmp_path}/train-images-idx3-ubyte.gz", image_shape=SHAPE)
    np.testing.assert_array_equal(one.tensors["label"], np.arange(5))
    with pytest.raises(InputError, match="data.split=validation"):
        load_source(f"idx:{tmp_path}", image_shape=SHAPE, split="validation")


def test_files_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "x-images-idx3-ubyte"
    write_idx(path, IMAGES)
    content = path.read_bytes()
    for data, message in (
        (b"", "begins with nothing, expected 00 00 08 03"),
        (content[:10], "is no idx file"),
        (content[:-1], "truncated: its header says 120 bytes"),
        (content + b"x", "more bytes of data"),
        (b"\0\0\x0d\3" + content[4:], "begins with 00 00 0d 03"),
        (content[:4] + b"\xff" * 12 + content[16:], "would take at least .* and this machine has"),
        (gzip.compress(content)[:-9], "cannot be read"),
        (gzip.compress(content[:-1]), "119 bytes of data"),
        (b"\x1f\x8bjunk", "cannot be read"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_source(f"idx:{path}", image_shape=SHAPE)
    path.write_bytes(content)
    write_idx(tmp_path / "x-labels-idx1-ubyte", np.arange(4, dtype=np.uint8))
    with pytest.raises(InputError, match=r"labels .*shape \[4\]; expected \[5\]"):
        load_source(f"idx:{path}", image_shape=SHAPE)
