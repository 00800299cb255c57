import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_tf.data.sources import ArraySource, FolderSource, load_source
from ddpm_tf.errors import InputError


def read(source, *indices):
    return source.read(np.array(indices))["image"].numpy()


def save(folder, name, array, **kwargs):
    Image.fromarray(array).save(folder / name, **kwargs)


def ramp(height=8, width=8, channels=3):
    ramp = np.arange(height * width * channels, dtype=np.uint32).reshape(height, width, channels) * 7 % 256
    return ramp.astype(np.uint8)


def test_digits_are_the_1797_real_ones():
    source = load_source("digits", image_shape=(8, 8, 1))
    assert source.num_examples == 1797
    images = source.tensors["image"].numpy()
    assert images.min() == 0 and images.max() == 255 and len(np.unique(images)) == 17
    np.testing.assert_array_equal(np.bincount(source.tensors["label"]).sum(), 1797)


def test_a_folder_is_read_in_byte_order_hidden_files_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    for k, name in enumerate(("b.png", "a é.png", "sub/c.PNG")):
        save(tmp_path, name, np.full((8, 8, 3), k, np.uint8))
    (tmp_path / ".DS_Store").write_bytes(b"x")
    source = load_source(f"folder:{tmp_path}", image_shape=(8, 8, 3))
    assert isinstance(source, ArraySource)
    np.testing.assert_array_equal(read(source, 0, 1, 2)[:, 0, 0, 0], [1, 0, 2])


def test_a_folder_that_does_not_fit_in_memory_is_read_when_needed(tmp_path):
    for k in range(3):
        save(tmp_path, f"{k}.png", np.full((8, 8, 3), k, np.uint8))
    source = load_source(f"folder:{tmp_path}", image_shape=(8, 8, 3), in_memory_mb=0)
    assert isinstance(source, FolderSource)
    np.testing.assert_array_equal(read(source, 2, 0)[:, 0, 0, 0], [2, 0])


def test_folder_images_are_cut_in_the_middle_and_shrunk(tmp_path):
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, 8:24] = 200
    save(tmp_path, "wide.png", picture)
    source = load_source(f"folder:{tmp_path}", image_shape=(8, 8, 3))
    np.testing.assert_array_equal(read(source, 0)[0], np.full((8, 8, 3), 200))


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    save(tmp_path, "turned.png", ramp(), exif=exif)
    np.testing.assert_array_equal(
        read(load_source(f"folder:{tmp_path}", image_shape=(8, 8, 3)), 0)[0], np.rot90(ramp(), -1)
    )


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (
            "broken.png",
            lambda p: p.write_bytes(b"not a picture"),
            r"broken.png \(13 bytes\) cannot be read as an image",
        ),
        ("page.jpg", lambda p: p.write_text("<html></html>"), "page.jpg .* cannot be read as an image"),
        ("empty.png", lambda p: p.write_bytes(b""), r"empty.png \(0 bytes\)"),
        ("small.png", lambda p: save(p.parent, p.name, ramp(4, 9)), "4x9 pixels, smaller than .* 8x8"),
        ("gray.png", lambda p: save(p.parent, p.name, ramp(channels=1)[..., 0]), "mode L; with data.channels=3"),
        ("alpha.png", lambda p: save(p.parent, p.name, ramp(channels=4)), "alpha channel"),
        ("deep.png", lambda p: save(p.parent, p.name, np.full((8, 8), 30000, np.uint16)), "mode I;16"),
        ("notes.txt", lambda p: p.write_text("x"), "notes.txt is not an image by its name"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(InputError, match=message):
        load_source(f"folder:{tmp_path}", image_shape=(8, 8, 3))


def test_a_truncated_picture_is_named(tmp_path):
    save(tmp_path, "whole.jpg", ramp(64, 64))
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "whole.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="whole.jpg .* cannot be read"):
        load_source(f"folder:{tmp_path}", image_shape=(8, 8, 3))


def test_animations_are_refused(tmp_path):
    frames = [Image.fromarray(ramp() + k) for k in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"animated \(\d frames\)"):
        load_source(f"folder:{tmp_path}", image_shape=(8, 8, 3))


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        load_source(f"folder:{tmp_path}", image_shape=(8, 8, 3))
    with pytest.raises(InputError, match="does not exist"):
        load_source(f"folder:{tmp_path}/none", image_shape=(8, 8, 3))


def test_npz_with_and_without_labels(tmp_path):
    images = np.stack([ramp(), ramp()[::-1]])
    np.savez(tmp_path / "a.npz", images=images, labels=[3, 4])
    source = load_source(f"npz:{tmp_path}/a.npz", image_shape=(8, 8, 3))
    np.testing.assert_array_equal(read(source, 1)[0], images[1])
    np.testing.assert_array_equal(source.read([1, 0])["label"], [4, 3])


def test_npz_files_that_cannot_be_used(tmp_path):
    np.savez(tmp_path / "other.npz", x=ramp()[None])
    np.savez(tmp_path / "floats.npz", images=ramp()[None] / 255.0)
    np.savez(tmp_path / "objects.npz", images=np.array([ramp(), None], dtype=object))
    np.savez(tmp_path / "short.npz", images=np.stack([ramp(), ramp()]), labels=[1])
    np.savez(tmp_path / "words.npz", images=ramp()[None], labels=["one"])
    (tmp_path / "junk.npz").write_bytes(b"PK\x03\x04junk")
    for name, message in (
        ("other", r"has the arrays \['x'\]; expected 'images'"),
        ("floats", "must be uint8 .* found float64"),
        ("objects", "cannot be read as an .npz"),
        ("junk", "cannot be read as an .npz"),
        ("short", r"one for each of the 2 images, found int64 \[1\]"),
        ("words", "Labels must be integers"),
        ("missing", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            load_source(f"npz:{tmp_path}/{name}.npz", image_shape=(8, 8, 3))


def test_unknown_sources_and_other_shapes_are_refused():
    with pytest.raises(InputError, match="Unknown data source 'digit'; expected one of .*'digits'"):
        load_source("digit", image_shape=(8, 8, 1))
    with pytest.raises(InputError, match=r"have shape \[8, 8, 1\].*ask for \[16, 16, 1\]"):
        load_source("digits", image_shape=(16, 16, 1))


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

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(InputError, match="'mnist' cannot be downloaded and prepared: no network"):
        load_source("tfds:mnist", image_shape=(28, 28, 1), data_dir=str(tmp_path), download=True)
    with pytest.raises(InputError, match="'mnist:99.0.0', which does not exist"):
        load_source("tfds:mnist:99.0.0", image_shape=(28, 28, 1), data_dir=str(tmp_path))


def test_tfds_that_is_not_prepared_gives_the_command(tmp_path):
    with pytest.raises(InputError, match=f"tfds build mnist --data_dir={tmp_path}"):
        load_source("tfds:mnist", image_shape=(28, 28, 1), data_dir=str(tmp_path))
    with pytest.raises(InputError, match="'minst', which does not exist"):
        load_source("tfds:minst", image_shape=(28, 28, 1), data_dir=str(tmp_path))
