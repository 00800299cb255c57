import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.data import make_dataset
from ddpm_tf.data.sources import ArraySource, load_source
from ddpm_tf.data.tfrecords import TFRecordSource, load_offsets
from ddpm_tf.errors import InputError

SHAPE = (4, 6, 3)


def image(k):
    return np.random.Generator(np.random.PCG64(k)).integers(0, 256, SHAPE, np.uint8)


def example(pixels, **extra):
    """A StyleGAN2 record: shape int64 [3] and data, both CHW."""
    chw = pixels.transpose(2, 0, 1)
    feature = {
        "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=chw.shape)),
        "data": tf.train.Feature(bytes_list=tf.train.BytesList(value=[chw.tobytes()])),
        **extra,
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write(path, records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "a-r02.tfrecords", [example(image(k)) for k in range(5)])
    write(tmp_path / "b-r02.tfrecords", [example(image(k)) for k in range(5, 8)])
    return tmp_path


def test_records_are_read_by_number_across_shards(shards):
    source = load_source(f"tfrecord:{shards}", image_shape=SHAPE, in_memory_mb=0)
    assert isinstance(source, TFRecordSource) and source.num_examples == 8
    np.testing.assert_array_equal(source.read(np.array([7, 0, 4, 5]))["image"], [image(k) for k in (7, 0, 4, 5)])
    in_memory = load_source(f"tfrecord:{shards}", image_shape=SHAPE)
    assert isinstance(in_memory, ArraySource)
    np.testing.assert_array_equal(in_memory.tensors["image"], [image(k) for k in range(8)])
    batches = (make_dataset(s, batch_size=3, seed=0).take(5) for s in (source, in_memory))
    for a, b in zip(*batches, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_the_offsets_are_kept_and_made_again_when_the_shard_changes(shards):
    path = str(shards / "a-r02.tfrecords")
    offsets = load_offsets(path)
    assert (shards / "a-r02.tfrecords.offsets.npz").exists()
    np.testing.assert_array_equal(load_offsets(path), offsets)
    (shards / "a-r02.tfrecords.offsets.npz").write_bytes(b"junk")
    np.testing.assert_array_equal(load_offsets(path), offsets)
    (shards / "b-r02.tfrecords.offsets.npz").unlink(missing_ok=True)
    load_source(f"tfrecord:{shards}", image_shape=SHAPE, read_only=True)
    assert not (shards / "b-r02.tfrecords.offsets.npz").exists()
    write(path, [example(image(k)) for k in range(2)])
    assert len(load_offsets(path)) == 2


def test_a_shard_that_is_missing_is_named(shards):
    (shards / "c-r02.tfrecords").symlink_to(shards / "gone")
    with pytest.raises(InputError, match="c-r02.tfrecords does not exist"):
        load_source(f"tfrecord:{shards}", image_shape=SHAPE)


def test_truncated_foreign_and_damaged_files_are_named(shards, tmp_path):
    path = shards / "a-r02.tfrecords"
    content = path.read_bytes()

    def refused(message, data, shape=SHAPE):
        path.write_bytes(data)
        (shards / "a-r02.tfrecords.offsets.npz").unlink(missing_ok=True)
        with pytest.raises(InputError, match=message):
            load_source(f"tfrecord:{path}", image_shape=shape)

    refused(r"record 4 at byte [\d,]+ runs past the end", content[:-10])
    refused("record 0 at byte 0 runs past the end", b"<html> not a record file at all </html>")
    refused("is empty", b"")
    flipped = bytearray(content)
    flipped[40] ^= 1
    refused("record 0 is damaged", bytes(flipped))
    refused(r"record 0 has shape \[3, 4, 6\] \(CHW\).*expected \[3, 8, 6\]", content, (8, 6, 3))
    write(path, [tf.train.Example().SerializeToString()])
    refused(r"has the features \[\]; expected 'shape' and 'data'", path.read_bytes())
    with pytest.raises(InputError, match="no TFRecord file and no folder"):
        load_source(f"tfrecord:{tmp_path / 'none'}", image_shape=SHAPE)


def test_an_index_that_does_not_fit_is_made_again(shards, caplog):
    caplog.set_level("INFO", logger="absl")
    path = shards / "a-r02.tfrecords"
    index = shards / "a-r02.tfrecords.offsets.npz"
    right = load_offsets(str(path))
    with np.load(index) as arrays:
        kept = dict(arrays)
    half = right.copy()
    half[3] -= 8
    for changed in (
        {"offsets": right[:1]}, {"offsets": right[1:]}, {"offsets": np.delete(right, 2)}, {"offsets": half},
        {"offsets": right[::-1]}, {"offsets": right.astype(np.float64)}, {"offsets": right + np.uint64(2**40)},
        {"offsets": right[None]}, {"offsets": right[:0]}, {"size": 7}, {"mtime_ns": 0}, {"digest": "x"},
        {"offsets": np.array([None, 1], dtype=object)},
    ):  # fmt: skip
        np.savez(index, **kept | changed)
        caplog.clear()
        np.testing.assert_array_equal(load_offsets(str(path)), right)
        assert "is made again" in caplog.text, changed
        caplog.clear()
        load_offsets(str(path))
        assert not caplog.text  # mended
    for damage in (b"", b"PK", index.read_bytes()[:100]):
        index.write_bytes(damage)
        np.testing.assert_array_equal(load_offsets(str(path)), right)
    index.unlink()
    index.mkdir()
    np.testing.assert_array_equal(load_offsets(str(path)), right)


def test_an_index_of_before_its_key_is_made_again(shards):
    path = str(shards / "a-r02.tfrecords")
    right = load_offsets(path)
    np.savez(f"{path}.offsets.npz", offsets=right[:1], size=(shards / "a-r02.tfrecords").stat().st_size)
    np.testing.assert_array_equal(load_offsets(path), right)


def test_a_length_that_lies_later_is_an_error_and_asks_for_no_memory(shards):
    path = shards / "a-r02.tfrecords"
    source = load_source(f"tfrecord:{path}", image_shape=SHAPE, in_memory_mb=0)
    content = bytearray(path.read_bytes())
    second = int(load_offsets(str(path))[1])
    content[second : second + 8] = (2**62).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(Exception, match="record 1 is damaged: its length is not"):
        source.read(np.array([1]))
