import numpy as np
import pytest
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
        (
            "small.png",
            lambda p: save(p.parent, p.name, ramp(4, 9)),
            r"(?s)4x9 pixels; .* at least 8x8.*data.image_size",
        ),
        (
            "gray.png",
            lambda p: save(p.parent, p.name, ramp(channels=1)[..., 0]),
            "(?s)mode L; images of 3 .*data.channels",
        ),
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
