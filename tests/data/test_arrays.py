import io
import zipfile

import numpy as np
import pytest

from ddpm_tf.data.arrays import ArraySource, load_digits
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


def test_arrays_under_the_names_of_other_programs(tmp_path):
    np.savez(tmp_path / "adm.npz", IMAGES, np.array([1, 0]))
    np.savez(tmp_path / "adm2.npz", IMAGES, np.array([0.5, 0.5]))
    np.savez(tmp_path / "keras.npz", x_train=IMAGES[..., 0], y_train=np.array([[1], [2]]), x_test=IMAGES[:1, ..., 0])
    source = load_source(f"npz:{tmp_path}/adm.npz", image_shape=SHAPE)
    np.testing.assert_array_equal(source.tensors["image"], IMAGES)
    np.testing.assert_array_equal(source.tensors["label"], [1, 0])
    assert "label" not in load_source(f"npz:{tmp_path}/adm2.npz", image_shape=SHAPE).tensors
    source = load_source(f"npz:{tmp_path}/keras.npz", image_shape=(8, 8, 1))
    np.testing.assert_array_equal(source.tensors["label"], [1, 2])
    assert load_source(f"npz:{tmp_path}/keras.npz", image_shape=(8, 8, 1), split="test").num_examples == 1


@pytest.mark.parametrize(("range", "low", "high"), [("0..1", 0, 1), ("-1..1", -1, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_of_a_given_range_are_their_grey_levels(tmp_path, range, low, high, dtype):
    np.savez(tmp_path / "a.npz", images=(IMAGES / 255 * (high - low) + low).astype(dtype))
    source = load_source(f"npz:{tmp_path}/a.npz", image_shape=SHAPE, range=range)
    np.testing.assert_array_equal(source.tensors["image"], IMAGES)


def test_channels_first_is_said_explicitly(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES.transpose(0, 3, 1, 2))
    source = load_source(f"npz:{tmp_path}/a.npz", image_shape=SHAPE, layout="channels_first")
    np.testing.assert_array_equal(source.tensors["image"], IMAGES)
    with pytest.raises(InputError, match=r"have shape \[3, 8, 8\]"):
        load_source(f"npz:{tmp_path}/a.npz", image_shape=SHAPE)


def test_npz_files_that_cannot_be_used(tmp_path):
    np.savez(tmp_path / "other.npz", x=IMAGES)
    np.savez(tmp_path / "floats.npz", images=IMAGES / 255.0)
    np.savez(tmp_path / "deep.npz", images=IMAGES.astype(np.uint16))
    np.savez(tmp_path / "objects.npz", images=np.array([IMAGES[0], None], dtype=object))
    np.savez(tmp_path / "short.npz", images=IMAGES, labels=[1])
    np.savez(tmp_path / "words.npz", images=IMAGES[:1], labels=["one"])
    np.savez(tmp_path / "none.npz", images=IMAGES[:0])
    (tmp_path / "junk.npz").write_bytes(b"PK\x03\x04junk")
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:  # not written by numpy
        archive.writestr("images", b"bytes")
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000, 3)}
    )
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("images.npy", head.getvalue() + b"few")
    for name, message in (
        ("other", r"has the arrays \['x'\]; expected 'images'"),
        ("raw", r"has the arrays \['images'\]; expected 'images'"),
        ("floats", "are float64 with values from 0 to 1; say their range by data.range"),
        ("deep", "are uint16 .*; expected uint8"),
        ("objects", "array of Python objects"),
        ("junk", "cannot be read as an .npz"),
        ("lie", "its header says .* 3,000,000,000,000,128 bytes. The file is damaged"),
        ("short", r"labels .*shape \[1\]; expected \[2\]"),
        ("words", "(?i)labels must be .*integer"),
        ("none", "must be uint8"),
        ("missing", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            load_source(f"npz:{tmp_path}/{name}.npz", image_shape=SHAPE)
    np.savez(tmp_path / "floats.npz", images=np.array([IMAGES[0] / 255.0, IMAGES[1] / 200.0]))
    with pytest.raises(InputError, match="Image 1 of images has values from 0 to 1.275, but data.range=0..1"):
        load_source(f"npz:{tmp_path}/floats.npz", image_shape=SHAPE, range="0..1")
    np.savez(tmp_path / "floats.npz", images=np.full((1, *SHAPE), np.nan))
    with pytest.raises(InputError, match="values from nan to nan"):
        load_source(f"npz:{tmp_path}/floats.npz", image_shape=SHAPE, range="-1..1")


@pytest.mark.parametrize("bad", [2**40 + 7, -1, 2**63 - 1, 2**31])
def test_labels_that_int32_does_not_hold_are_refused(bad):
    with pytest.raises(InputError, match=f"(?i)labels .*{bad}"):
        ArraySource(IMAGES, np.array([0, bad]))
    with pytest.raises(InputError, match="(?i)labels must be .*integer"):
        ArraySource(IMAGES, np.array([0.0, 1.0]))
