import os

import numpy as np
import pytest
from PIL import Image

from ddpm_tf.data.picture import DRAFT, PictureError, PictureOptions, decode, decode_image, examine, fit
from ddpm_tf.errors import InputError
from tests.data import zoo

SHAPE = (zoo.SIZE, zoo.SIZE, 3)
AUTO = PictureOptions(SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    zoo.write(folder, zoo.GOOD)
    zoo.write(folder, zoo.BAD)
    return folder


def path_of(folder, name):
    return os.path.join(folder, os.fsdecode(name))


def test_the_zoo_is_large():
    assert len(zoo.GOOD) >= 60 and len(zoo.BAD) >= 25


@pytest.mark.parametrize("name", zoo.GOOD, ids=ascii)
def test_a_picture_of_the_zoo_gives_the_right_pixels(folder, name):
    expected = zoo.GOOD[name][1]()
    path = path_of(folder, name)
    pixels, _ = decode(path, AUTO)
    difference = np.abs(pixels.astype(int) - expected)
    # Pillow mixes with a background in integers, before it shrinks; the zoo does it in floats.
    assert difference.max() <= (2 if "clear" in str(name) or str(name) == "la.png" else 0)
    upright = zoo.ImageOps.exif_transpose(zoo.opened(zoo.GOOD[name][0]))
    assert examine(path, AUTO)[2:] == (upright.height, upright.width)


@pytest.mark.parametrize("name", [name for name, (_, kind) in zoo.BAD.items() if kind != "name"])
def test_a_picture_that_cannot_be_used_is_refused_by_kind(folder, name):
    with pytest.raises(PictureError) as e:
        decode(path_of(folder, name), AUTO)
    assert e.value.problem.kind == zoo.BAD[name][1], str(e.value)
    with pytest.raises(InputError, match=name):
        decode_image(path_of(folder, name), AUTO)


@pytest.mark.parametrize(("background", "colour"), [("black", 0), ("white", 255)])
def test_transparency_is_put_on_the_background(folder, background, colour):
    image = Image.open(folder / "clear.png")
    pixels, notes = decode(path_of(folder, "clear.png"), AUTO._replace(background=background))
    assert np.abs(pixels.astype(int) - zoo.on(colour, image)).max() <= 2 and notes == [
        f"transparent, put on {background}"
    ]
    dropped, _ = decode(path_of(folder, "clear.png"), AUTO._replace(background="drop"))
    np.testing.assert_array_equal(dropped, zoo.scaled(zoo.RGB))


def test_every_picture_can_be_grey(folder):
    for name in ("png.png", "grey.png", "one.png", "palette.png", "ink.tif", "deep.png"):
        pixels, _ = decode(path_of(folder, name), AUTO._replace(image_shape=(16, 16, 1)))
        expected = zoo.GOOD[name][1]().astype(float) @ [0.299, 0.587, 0.114]
        assert np.abs(pixels[..., 0] - expected).max() < 3, name  # shrunk (and clipped) in colour there, in grey here


def test_notes_say_what_was_done(folder):
    notes = {
        name: decode(path_of(folder, name), AUTO)[1]
        for name in ("png.png", "grey.png", "turn6.jpg", "adobe.png", "srgb.png")
    }
    assert notes == {"png.png": [], "grey.png": ["grey"], "turn6.jpg": ["turned upright"],
                     "adobe.png": ["ICC profile, to sRGB"], "srgb.png": []}  # fmt: skip
    assert decode(path_of(folder, "bad_icc.png"), AUTO)[1] == ["ICC profile that cannot be used: taken as sRGB"]


def test_strict_takes_what_needs_no_decision_alone(folder):
    strict = AUTO._replace(convert="strict")
    for name in ("png.png", "palette.png", "ink.tif", "turn6.png"):
        np.testing.assert_array_equal(decode(path_of(folder, name), strict)[0], zoo.GOOD[name][1]())
    for name, kind in (
        ("opaque.png", "transparent"),
        ("grey.png", "mode"),
        ("deep.png", "mode"),
        ("loop.gif", "animated"),
    ):
        with pytest.raises(PictureError) as e:
            decode(path_of(folder, name), strict)
        assert e.value.problem.kind == kind
    np.testing.assert_array_equal(decode(path_of(folder, "adobe.png"), strict)[0], zoo.scaled(zoo.RGB))


def test_the_first_of_several_pictures_is_taken_if_asked(folder):
    for name in ("loop.png", "loop.webp", "pages.tif"):
        pixels, _ = decode(path_of(folder, name), AUTO._replace(animated="first"))
        assert np.abs(pixels.astype(int) - zoo.scaled(zoo.opened(zoo.BAD[name][0]))).max() == 0


def test_small_pictures_are_enlarged_or_left_out_if_asked(folder):
    pixels, notes = decode(path_of(folder, "small.png"), AUTO._replace(small="enlarge"))
    assert pixels.shape == SHAPE and notes == ["enlarged"]
    with pytest.raises(PictureError, match="smaller"):
        decode(path_of(folder, "small.png"), AUTO._replace(small="skip"))


@pytest.mark.parametrize("late", [False, True])
def test_the_orientation_counts_for_images_that_are_no_squares(tmp_path, late):
    """Also where a PNG has it behind its pixels, and only the header is looked at."""
    block = zoo.chunk(b"eXIf", zoo.exif(6).tobytes()[6:])
    for height, width, fits in ((8, 16, True), (16, 8, False)):
        pixels = np.zeros((height, 3 * width), np.uint8)
        where = {"after": block} if late else {"before": block}
        (tmp_path / "x.png").write_bytes(zoo.png(height, width, zoo.png_rows(pixels), **where))
        for look in (examine, decode):
            if fits:
                look(str(tmp_path / "x.png"), PictureOptions((16, 8, 3)))
            else:
                with pytest.raises(PictureError, match="8x16 pixels, expected at least 16x8"):
                    look(str(tmp_path / "x.png"), PictureOptions((16, 8, 3)))


def test_a_large_jpeg_is_decoded_smaller_within_the_stated_bound(tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))
    large = sum(
        np.asarray(Image.fromarray(rng.normal(0, s**0.7, (768 // s, 1024 // s)).astype(np.float32)).resize((1024, 768)))
        for s in (4, 8, 16, 32, 64, 128)
    )
    large = np.stack([large * f for f in (1, 0.8, -0.5)], axis=-1)
    large[200:400, 300:700] += 80  # edges
    large = (128 + 110 * large / np.abs(large).max()).astype(np.uint8)
    Image.fromarray(large).save(tmp_path / "large.jpg", quality=90)
    for size in (16, 24, 64, 128):
        options = PictureOptions((size, size, 3))
        drafted, full = (
            decode(str(tmp_path / "large.jpg"), options._replace(convert=c))[0] for c in ("auto", "strict")
        )
        difference = np.abs(drafted.astype(int) - full)
        assert difference.max() <= 8 and difference.mean() <= 0.3
        assert (size * DRAFT * 2 > 768) == (difference.max() == 0)  # larger ones are decoded in full


def test_arrays_are_fitted_as_files_are():
    np.testing.assert_array_equal(fit(zoo.BASE, SHAPE), zoo.scaled(zoo.RGB))
    for bad in (zoo.BASE[:8], zoo.BASE[..., :2], zoo.BASE.astype(np.float32)):
        with pytest.raises(InputError, match="expected"):
            fit(bad, SHAPE)
