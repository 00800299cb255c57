"""One picture file to pixels: its format, orientation, colours and size."""

import contextlib
import functools
import io
import os
import stat
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from ddpm_tf.data.problems import Problem
from ddpm_tf.errors import InputError
from ddpm_tf.paths import kind_of

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif",
)  # fmt: skip
CONVERT, BACKGROUND = ("auto", "strict"), ("white", "black", "drop")
SMALL, ANIMATED = ("refuse", "enlarge", "skip"), ("refuse", "first")
# More pixels than this are not decoded: RGB takes 192 MiB, and work on it as much again.
MAX_PIXELS = 2**26
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still this many times the height and width asked for. The result
# differs from that of a full decoding by at most 8 grey levels, 0.3 on average (tests/data/test_picture.py).
DRAFT = 4

_HEAD = 32
# [(Pillow's names of a format, a test of the first bytes)]. No other format is read: Pillow would start programs for some.
_FORMATS: list[tuple[tuple[str, ...], Callable[[bytes], bool]]] = [
    (("JPEG", "MPO"), lambda h: h.startswith(b"\xff\xd8\xff")),
    (("PNG",), lambda h: h.startswith(b"\x89PNG\r\n\x1a\n")),
    (("WEBP",), lambda h: h[:4] == b"RIFF" and h[8:12] == b"WEBP"),
    (("BMP",), lambda h: h.startswith(b"BM")),
    (("GIF",), lambda h: h[:6] in (b"GIF87a", b"GIF89a")),
    (("TIFF",), lambda h: h[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (("AVIF",), lambda h: h[4:8] == b"ftyp" and (h[8:12] in (b"avif", b"avis") or b"avif" in h[16:])),
]
# [(what it is, a test of the first bytes)]: what people have under the names of pictures.
_FOREIGN: list[tuple[str, Callable[[bytes], bool]]] = [
    ("HEIC", lambda h: h[4:8] == b"ftyp" and h[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")),
    ("a film", lambda h: h[4:8] == b"ftyp"),
    ("PostScript", lambda h: h.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6"))),
    ("PDF", lambda h: h.startswith(b"%PDF")),
    ("JPEG XL", lambda h: h.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL "))),
    ("JPEG 2000", lambda h: h.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"))),
    ("Photoshop", lambda h: h.startswith(b"8BPS")),
    ("an archive", lambda h: h.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf"))),
    ("a pointer of Git LFS", lambda h: h.startswith(b"version https://git-lfs")),
    ("HTML, XML or SVG", lambda h: h.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")),
]
_STRICT_MODES = {1: ("1", "L"), 3: ("RGB", "P", "CMYK", "YCbCr")}
_AUTO_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_NOTES = {"1": "1-bit", "P": "with a palette", "PA": "with a palette", "CMYK": "CMYK"}
_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class PictureOptions(NamedTuple):
    """How pictures become images; the fields are those of the config section `data`."""

    image_shape: tuple[int, int, int]
    convert: str = "auto"
    background: str = "white"
    small: str = "refuse"
    animated: str = "refuse"


class Header(NamedTuple):
    """What the beginning of a file says.

    height, width: of the upright picture, pixels. mode: Pillow's.
    """

    format: str
    mode: str
    height: int
    width: int


class PictureError(Exception):
    """A picture that cannot be used; `problem` says why."""

    def __init__(self, path: str, kind: str, detail: str = "") -> None:
        self.problem = Problem(path, kind, detail)
        super().__init__(str(self.problem))


class SkippedError(PictureError):
    """A picture that the options leave out."""


def decode_image(path: str, options: PictureOptions) -> np.ndarray:
    """One file as uint8 [H, W, C], see `decode`.

    Raises:
        InputError: naming the file, what is wrong with it, and what to do.
    """
    try:
        return decode(path, options)[0]
    except PictureError as e:
        raise InputError(str(e)) from e


def examine(path: str, options: PictureOptions) -> Header:
    """The header of a file. Raises the errors of `decode` that it shows; the pixels are not read.

    Raises:
        PictureError
    """
    with _opened(path) as image:
        header = _header(path, image, _is_on_its_side(image))
        _check(path, image, header, options)
    return header


def decode(path: str, options: PictureOptions) -> tuple[np.ndarray, list[str]]:
    """One file as uint8 [H, W, C]: turned upright, cut in the middle to the aspect ratio, then shrunk.

    Returns:
        the pixels, and what was done to them for the report, such as "CMYK" or "turned upright".

    Raises:
        PictureError: naming the file and what is wrong with it.
    """
    height, width, channels = options.image_shape
    notes: list[str] = []
    with _opened(path) as image:
        _check(path, image, _header(path, image, False), options._replace(small="enlarge"))
        if options.convert == "auto" and image.format in ("JPEG", "MPO"):
            _draft(image, height, width)
        _check_pixels(path, image)
        image.load()
        orientation = _orientation(image)
        _check_size(path, _header(path, image, orientation >= 5), options)
        if orientation in _TURNS:
            notes.append("turned upright")
            upright = image.transpose(_TURNS[orientation])
        else:
            upright = image
        if options.convert == "auto":
            upright = _convert(path, upright, channels, options.background, notes)
        upright = upright.convert("L" if channels == 1 else "RGB")
    if upright.height < height or upright.width < width:
        notes.append("enlarged")
    return _cut_and_scaled(upright, options.image_shape), notes


def fit(pixels: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [h, w, 1 or 3] as uint8 [H, W, C], in the way of `decode`.

    Raises:
        InputError: pixels of another kind, or fewer than H x W.
    """
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.dtype != np.uint8:
        raise InputError(f"An image is {pixels.dtype} {list(pixels.shape)}; expected uint8 [height, width, 1 or 3].")
    if pixels.shape[0] < image_shape[0] or pixels.shape[1] < image_shape[1]:
        raise InputError(
            f"An image has {pixels.shape[0]}x{pixels.shape[1]} pixels, expected at least {image_shape[0]}x{image_shape[1]}: "
            "images are not enlarged. Ask for a smaller data.image_size."
        )
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return _cut_and_scaled(image.convert("L" if image_shape[2] == 1 else "RGB"), image_shape)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The picture, as Pillow opens it. What Pillow raises in the block becomes a PictureError."""
    try:
        with _open_file(path) as file:
            formats = _formats(path, file.read(_HEAD))
            file.seek(0)
            with Image.open(file, formats=formats) as image:
                yield image
    except PictureError:
        raise
    except PermissionError as e:
        raise PictureError(path, "unreadable") from e
    except FileNotFoundError as e:
        raise PictureError(path, "dangling" if os.path.islink(path) else "damaged", "it is gone") from e
    except Image.DecompressionBombError as e:
        raise PictureError(path, "large", "more than Pillow decodes") from e
    except Exception as e:  # Pillow raises many kinds, OSError, SyntaxError and struct.error among them
        reason = str(e).partition("\n")[0] or type(e).__name__
        # Pillow names the file object, of which the user knows nothing.
        raise PictureError(path, "damaged", reason.partition(" <_io.")[0]) from e


def _open_file(path: str) -> IO[bytes]:
    """Open a regular file; opening a named pipe would wait for somebody who writes into it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise PictureError(path, "irregular", kind_of(mode))
    return open(descriptor, "rb")


def _formats(path: str, head: bytes) -> tuple[str, ...]:
    """Pillow's names of the format, by the first bytes of the file; its name says nothing."""
    if not head:
        raise PictureError(path, "damaged", "empty, 0 bytes")
    for names, matches in _FORMATS:
        if matches(head):
            return names
    foreign = next((name for name, matches in _FOREIGN if matches(head)), f"it begins with {head[:12]!r}")
    raise PictureError(path, "format", foreign)


def _header(path: str, image: Image.Image, is_on_its_side: bool) -> Header:
    size = (image.width, image.height) if is_on_its_side else (image.height, image.width)
    return Header(image.format or "", image.mode, *size)


def _is_on_its_side(image: Image.Image) -> bool:
    """EXIF orientations 5 to 8. Asking a PNG without EXIF before its pixels would decode all of them; Pillow turns TIFFs."""
    if image.format == "TIFF":
        return False
    if image.format == "PNG" and "exif" not in image.info and not _has_late_exif(getattr(image, "fp", None)):
        return False
    return _orientation(image) >= 5


def _orientation(image: Image.Image) -> int:
    """EXIF's 1 to 8; 1, upright, where there is no EXIF or none that can be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # of a damaged EXIF block; viewers show the picture all the same
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def _has_late_exif(file: IO[bytes] | None) -> bool:
    """Whether a PNG has its EXIF behind its pixels, where some programs write it: by the lengths of its chunks."""
    if file is None:
        return False
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            if head[4:] == b"eXIf":
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(position)


def _check(path: str, image: Image.Image, header: Header, options: PictureOptions) -> None:
    """Refuse what the header shows."""
    channels = options.image_shape[2]
    if options.animated == "refuse" and image.format != "MPO" and getattr(image, "is_animated", False):
        what = "pages" if header.format == "TIFF" else "frames"
        raise PictureError(path, "animated", f"{getattr(image, 'n_frames', 2)} {what}")
    is_auto = options.convert == "auto"
    if not is_auto and image.has_transparency_data:
        raise PictureError(path, "transparent")
    is_deep = is_auto and image.mode.startswith("I;16")
    if not is_deep and image.mode not in (_AUTO_MODES if is_auto else _STRICT_MODES[channels]):
        raise PictureError(path, "mode", f"Pillow mode {image.mode}, for images of {channels} channels")
    if is_deep and image.has_transparency_data:
        raise PictureError(path, "mode", "16 bits with transparency")
    _check_size(path, header, options)


def _check_size(path: str, header: Header, options: PictureOptions) -> None:
    height, width, _ = options.image_shape
    if options.small != "enlarge" and (header.height < height or header.width < width):
        error = SkippedError if options.small == "skip" else PictureError
        raise error(path, "small", f"{header.height}x{header.width} pixels, expected at least {height}x{width}")


def _check_pixels(path: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(path, "large", f"{image.height}x{image.width}, at most {MAX_PIXELS:,} are decoded")


def _draft(image: Image.Image, height: int, width: int) -> None:
    """Ask for a smaller decoding of a JPEG, see DRAFT. The sides may be exchanged yet: both must stay large enough."""
    side = DRAFT * max(height, width)
    image.draft(None, (side, side))  # type: ignore[arg-type]  # None: the mode stays


def _convert(path: str, image: Image.Image, channels: int, background: str, notes: list[str]) -> Image.Image:
    """Any colours to sRGB or grey without transparency."""
    if image.mode.startswith("I;16"):
        notes.append("16-bit")
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in _NOTES:
        notes.append(_NOTES[image.mode])
    profile, alpha = image.info.get("icc_profile"), None
    if image.has_transparency_data:
        is_grey, rgba = image.mode in ("L", "LA", "La"), image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.getchannel("R") if is_grey else rgba.convert("RGB")
        is_opaque = alpha.getextrema() == (255, 255)
        notes.append("opaque alpha" if is_opaque else f"transparent, {_ON[background]}")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    is_grey = image.mode == "L"
    if profile:
        image = _to_srgb(image, profile, notes)
    if is_grey and channels == 3:
        notes.append("grey")
    elif not is_grey and channels == 1:
        notes.append("colours to grey")
    image = image.convert("L" if channels == 1 else "RGB")
    if alpha is not None and background != "drop":
        image = Image.composite(image, Image.new(image.mode, image.size, background), alpha)
    return image


_ON = {"white": "put on white", "black": "put on black", "drop": "alpha dropped"}


def _to_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """Colours by an ICC profile to sRGB; a profile that cannot be used leaves them, as every viewer does."""
    try:
        transform = _transform(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError):
        notes.append("ICC profile that cannot be used: taken as sRGB")
        return image
    if transform is None:
        return image
    notes.append("ICC profile, to sRGB")
    return transform.apply(image)


@functools.lru_cache(64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None for one that says sRGB, to 2 grey levels. Several threads may use it at once."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    flags = ImageCms.Flags.NOCACHE  # the cache would be shared by threads
    target = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, target, mode, "RGB", flags=flags)
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if mode != "RGB":
        return transform
    grid = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, len(levels), 3))
    change = np.asarray(transform.apply(grid)).astype(int) - np.asarray(grid)
    return None if np.abs(change).max() <= 2 else transform


def _cut_and_scaled(image: Image.Image, image_shape: tuple[int, int, int]) -> np.ndarray:
    height, width, _ = image_shape
    if (image.height, image.width) != (height, width):
        image = _cut_to_aspect(image, width / height).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8).reshape(image_shape)


def _cut_to_aspect(image: Image.Image, aspect: float) -> Image.Image:
    """The largest middle part with width / height = aspect.

    The image is cut before it is shrunk, so that pixels outside the part do not blend into its border.
    """
    width, height = min(image.width, round(image.height * aspect)), min(image.height, round(image.width / aspect))
    width, height = max(width, 1), max(height, 1)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
