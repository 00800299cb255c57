import numpy as np
import pytest

from ddpm_tf.data.arrays import load_digits
from ddpm_tf.data.sources import load_source
from ddpm_tf.errors import InputError

SHAPE = (8, 8, 3)
IMAGES = np.arange(2 * 8 * 8 * 3, dtype=np.uint32).reshape(2, *SHAPE).astype(np.uint8)


def test_digits_are_the_1797_real_ones():
    source = load_digits()
    assert source.num_examples == 1797
    images = source.tensors["image"].numpy()
    assert images.min() == 0 and images.max() == 255 and len(np.unique(images)) == 17
    np.testing.assert_array_equal(np.bincount(source.tensors["label"]).sum(), 1797)


def test_npz_with_and_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=[3, 4])
    np.savez(tmp_path / "b.npz", images=IMAGES)
    batch = load_source(f"npz:{tmp_path}/a.npz", image_shape=SHAPE).read(np.array([1, 0]))
    np.testing.assert_array_equal(batch["image"], IMAGES[::-1])
    np.testing.assert_array_equal(batch["label"], [4, 3])
    assert load_source(f"npz:{tmp_path}/b.npz", image_shape=SHAPE).read(np.array([0])).keys() == {"image"}


def test_npz_files_that_cannot_be_used(tmp_path):
    np.savez(tmp_path / "other.npz", x=IMAGES)
    np.savez(tmp_path / "floats.npz", images=IMAGES / 255.0)
    np.savez(tmp_path / "objects.npz", images=np.array([IMAGES[0], None], dtype=object))
    np.savez(tmp_path / "short.npz", images=IMAGES, labels=[1])
    np.savez(tmp_path / "words.npz", images=IMAGES[:1], labels=["one"])
    (tmp_path / "junk.npz").write_bytes(b"PK\x03\x04junk")
    for name, message in (
        ("other", r"has the arrays \['x'\]; expected 'images'"),
        ("floats", "must be uint8 .* are float64"),
        ("objects", "cannot be read as an .npz"),
        ("junk", "cannot be read as an .npz"),
        ("short", r"one for each of the 2 images, but are int64 \[1\]"),
        ("words", "Labels must be integers"),
        ("missing", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            load_source(f"npz:{tmp_path}/{name}.npz", image_shape=SHAPE)
