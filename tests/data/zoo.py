"""A zoo of picture files as people have them, each with the pixels that it should give, computed in another way."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

SIZE = 16  # of the square images that are asked for
rng = np.random.Generator(np.random.PCG64(7))
BASE = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((32, 24), Image.Resampling.BICUBIC))
RGB, GREY = Image.fromarray(BASE), Image.fromarray(BASE).convert("L")
ALPHA = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (24, 1)))
DEEP = (BASE[..., 0].astype(np.uint16) * 257 + 3).clip(0, 65535).astype(np.uint16)


def scaled(image: Image.Image) -> np.ndarray:
    """The middle square, shrunk: the rule for every picture."""
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(
        image.crop(box).resize((SIZE, SIZE), Image.Resampling.LANCZOS) if side != SIZE else image.crop(box)
    )


def on(colour: int, image: Image.Image) -> np.ndarray:
    """An RGBA picture over one grey level, by arithmetic."""
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return scaled(Image.fromarray(np.rint(pixels[..., :3] * alpha + colour * (1 - alpha)).astype(np.uint8)))


def icc(gamma: float, primaries: list[tuple[float, float, float]] | None) -> bytes:
    """A small ICC profile (version 2): a gamma curve, and the primaries' XYZ at D50; None: a grey profile."""

    def s15(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: tuple[float, float, float]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249)), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    if primaries:
        tags |= {c + b"XYZ": xyz(p) for c, p in zip((b"r", b"g", b"b"), primaries, strict=True)}
        tags |= {c + b"TRC": curve for c in (b"r", b"g", b"b")}
    else:
        tags[b"kTRC"] = curve
    offset, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    space = b"RGB " if primaries else b"GRAY"
    head = struct.pack(">I4sI4s4s4s", offset + len(data), b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(map(s15, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


# Adobe RGB (1998): gamma 2.2 and its primaries at D50.
ADOBE = icc(2.2, [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])
GREY_18 = icc(1.8, None)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    target = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, io.BytesIO(profile), target, outputMode="RGB")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, rows: bytes, *, depth: int = 8, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG by hand, with chunks before and after its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")


def png_rows(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


# {file name: (content, what it should give on white)}
GOOD: dict[str | bytes, tuple[bytes, Callable[[], np.ndarray]]] = {}


def good(name: str | bytes, content: bytes, expected: Callable[[], np.ndarray] | Image.Image | None = None) -> None:
    """Without `expected`, what Pillow opens is right as it is."""
    if expected is None:
        expected = opened(content)
    GOOD[name] = content, expected if callable(expected) else lambda image=expected: scaled(image)


def _fill() -> None:
    # Formats and compressions
    good("png.png", saved(RGB, "PNG"), RGB)
    good("exact.png", saved(RGB.resize((SIZE, SIZE)), "PNG"), RGB.resize((SIZE, SIZE)))
    for end in ("jpg", "jpeg", "jfif", "jpe", "JPG"):
        good(f"{end}.{end}", saved(RGB, "JPEG", quality=90))
    good("progressive.jpg", saved(RGB, "JPEG", progressive=True))
    good("bmp.bmp", saved(RGB, "BMP"), RGB)
    good("webp.webp", saved(RGB, "WEBP", lossless=True), RGB)
    good("lossy.webp", saved(RGB, "WEBP"))
    good("gif.gif", saved(RGB, "GIF"))
    good("grey.gif", saved(GREY, "GIF"), GREY)
    good("tif.tif", saved(RGB, "TIFF"), RGB)
    good("lzw.tiff", saved(RGB, "TIFF", compression="tiff_lzw"), RGB)
    good("jpeg.tiff", saved(RGB, "TIFF", compression="jpeg"))
    good("avif.avif", saved(RGB, "AVIF"))
    # Grey, few bits, many bits, palettes, ink
    good("grey.png", saved(GREY, "PNG"), GREY)
    good("grey.jpg", saved(GREY, "JPEG"))
    good("one.png", saved(RGB.convert("1"), "PNG"), RGB.convert("1"))
    good("fax.tif", saved(RGB.convert("1"), "TIFF", compression="group4"), RGB.convert("1"))
    deep = Image.fromarray(np.rint(DEEP / 257).astype(np.uint8))
    good("deep.png", saved(Image.fromarray(DEEP), "PNG"), deep)
    good("deep.tif", saved(Image.fromarray(DEEP), "TIFF"), deep)
    wide = png(24, 32, png_rows((BASE.astype(">u2") * 257).reshape(24, -1)), depth=16)
    good("deep_rgb.png", wide, RGB)
    palette = RGB.quantize(32)
    good("palette.png", saved(palette, "PNG"), palette)
    good("palette.bmp", saved(palette, "BMP"), palette)
    good("ink.jpg", saved(RGB.convert("CMYK"), "JPEG", quality=95))
    good("ink.tif", saved(RGB.convert("CMYK"), "TIFF"), RGB.convert("CMYK"))
    good("ycc.tif", saved(RGB.convert("YCbCr"), "TIFF"), RGB.convert("YCbCr"))
    # Transparency
    clear = RGB.copy()
    clear.putalpha(ALPHA)
    opaque = RGB.copy()
    opaque.putalpha(255)
    two = GREY.copy()
    two.putalpha(ALPHA)
    good("opaque.png", saved(opaque, "PNG"), RGB)
    for name, image, kind, options in (
        ("clear.png", clear, "PNG", {}), ("clear.webp", clear, "WEBP", {"lossless": True, "exact": True}),
        ("clear.tif", clear, "TIFF", {}), ("la.png", two, "PNG", {}),
    ):  # fmt: skip
        good(name, saved(image, kind, **options), lambda image=image: on(255, image))
    solid = Image.fromarray(
        np.where(BASE[..., :1] > 128, np.array([255, 0, 0]), np.array([0, 0, 255])).astype(np.uint8)
    )
    good("trns.png", saved(solid, "PNG", transparency=(255, 0, 0)), _red_is_white(solid))
    half = Image.fromarray(np.where(BASE[..., 0] > 128, 7, 90).astype(np.uint8))
    good("grey_trns.png", saved(half, "PNG", transparency=7), half.point(lambda v: 255 if v == 7 else v))
    indexed = solid.quantize(2)
    seen = np.asarray(indexed)
    red = int(seen[np.asarray(solid)[..., 0] == 255][0])
    good("palette_trns.png", saved(indexed, "PNG", transparency=red), _red_is_white(solid))
    good("clear.gif", saved(indexed, "GIF", transparency=red), _red_is_white(solid))
    # Orientation
    for turn in range(1, 9):
        for end, kind in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF")):
            if end in ("jpg", "png") or turn in (3, 6):
                content = saved(RGB, kind, exif=exif(turn))
                good(f"turn{turn}.{end}", content, ImageOps.exif_transpose(opened(content)))
    late = png(24, 32, png_rows(BASE.reshape(24, -1)), after=chunk(b"eXIf", exif(6).tobytes()[6:]))
    good("late.png", late, Image.fromarray(np.rot90(BASE, -1).copy()))
    good("bad_exif.jpg", saved(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffjunk"))
    # Colour profiles
    for end, kind in (("png", "PNG"), ("tif", "TIFF")):
        good(f"adobe.{end}", saved(RGB, kind, icc_profile=ADOBE), to_srgb(RGB, ADOBE))
    lossy = saved(RGB, "JPEG", icc_profile=ADOBE, quality=95)
    good("adobe.jpg", lossy, to_srgb(opened(lossy), ADOBE))
    shown = to_srgb(RGB, ADOBE)
    shown.putalpha(ALPHA)
    good("adobe_clear.png", saved(clear, "PNG", icc_profile=ADOBE), lambda: on(255, shown))
    good("grey18.png", saved(GREY, "PNG", icc_profile=GREY_18), to_srgb(GREY, GREY_18))
    good("srgb.png", saved(RGB, "PNG", icc_profile=SRGB), RGB)
    good("bad_icc.png", saved(RGB, "PNG", icc_profile=b"junk"), RGB)
    good("foreign_icc.png", saved(GREY, "PNG", icc_profile=ADOBE), GREY)  # of colours, on a grey picture
    # Several pictures that are one
    good("phone.jpg", saved(RGB, "MPO", save_all=True, append_images=[GREY.convert("RGB").resize((16, 12))]))
    # Names
    good("jpeg named.png", saved(RGB, "JPEG"))
    for name in (
        " space.png",
        "[1]*?.png",
        "-x.png",
        "nfd e\u0301.png",
        "new\nline.png",
        "quote'\".png",
        "back\\slash.png",
    ):
        good(name, saved(RGB, "PNG"), RGB)
    good(b"bytes\xff.png", saved(RGB, "PNG"), RGB)


def _red_is_white(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).copy()
    pixels[pixels[..., 0] == 255] = 255
    return Image.fromarray(pixels)


_fill()


def frames(kind: str, **options: object) -> bytes:
    return saved(RGB, kind, save_all=True, append_images=[GREY.convert("RGB")], **options)


# {file name: (content, the kind of its problem)}
BAD: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "damaged"), "page.jpg": (b"<html>404</html>", "format"), "drawing.png": (b"<?xml?><svg/>", "format"),
    "apple.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "format"), "film.gif": (b"\0\0\0\x18ftypmp42\0\0\0\0", "format"),
    "post.jpg": (saved(RGB, "EPS"), "format"), "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "format"),
    "paper.jpg": (b"%PDF-1.7\n", "format"), "zip.png": (b"PK\x03\x04" + bytes(40), "format"),
    "half.jpg": (saved(RGB, "JPEG")[:400], "damaged"), "half.png": (saved(RGB, "PNG")[:900], "damaged"),
    "half.gif": (saved(RGB, "GIF")[:60], "damaged"), "half.tif": (saved(RGB, "TIFF")[:600], "damaged"),
    "half.webp": (saved(RGB, "WEBP", lossless=True)[:300], "damaged"), "half.bmp": (saved(RGB, "BMP")[:300], "damaged"),
    "half.avif": (saved(RGB, "AVIF")[:300], "damaged"), "head.png": (saved(RGB, "PNG")[:16], "damaged"),
    "crc.png": (saved(RGB, "PNG").replace(b"IHDR\0", b"IHDR\1", 1), "damaged"),
    "lie.png": (png(2**31 - 1, 2**31 - 1, b""), "large"), "bomb.png": (png(9000, 9000, bytes(9000 * 27001)), "large"),
    "small.png": (saved(RGB.resize((40, 8)), "PNG"), "small"), "thin.jpg": (saved(RGB.resize((4, 400)), "JPEG"), "small"),
    "loop.gif": (frames("GIF"), "animated"), "loop.webp": (frames("WEBP"), "animated"), "loop.png": (frames("PNG"), "animated"),
    "pages.tif": (frames("TIFF"), "animated"), "float.tif": (saved(GREY.convert("F"), "TIFF"), "mode"),
    "int32.tif": (saved(GREY.convert("I"), "TIFF"), "mode"), "notes.txt": (b"x", "name"), "model.ckpt": (b"x", "name"),
}  # fmt: skip
LITTER = ("Thumbs.db", "desktop.ini", ".DS_Store", "._x.png", "__MACOSX/x.png")


def write(folder: Path, files: dict) -> None:
    for name, (content, _) in files.items():
        with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "wb") as f:
            f.write(content)


def add_things(folder: Path) -> dict[str, str]:
    """Links, pipes and sockets with the names of pictures; {name: kind of its problem}."""
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "sock.png"))
    (folder / "null.png").symlink_to("/dev/null")
    return {
        "gone.png": "dangling",
        "itself.png": "dangling",
        "pipe.png": "irregular",
        "sock.png": "irregular",
        "null.png": "irregular",
    }
