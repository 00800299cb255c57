"""Folders of image files."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from ddpm_tf.data.arrays import ArraySource
from ddpm_tf.data.contract import LoadOptions, file_entries
from ddpm_tf.errors import DataNotFoundError, InputError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")


class FolderSource:
    """Image files, decoded at every read; see `contract.Source`.

    Args:
        paths: the files, in the order in which they are numbered.
        image_shape: (H, W, C) that every image is cut and shrunk to.
        root: the folder that the names in `files` are relative to.
    """

    def __init__(self, paths: Sequence[str], image_shape: tuple[int, int, int], root: str) -> None:
        self.num_examples, self.image_shape = len(paths), image_shape
        self.paths, self.files = paths, file_entries(paths, root)

    def read(self, indices: np.ndarray | tf.Tensor) -> dict[str, tf.Tensor]:
        """See `contract.Source.read`."""
        return {"image": tf.numpy_function(self.decode, [indices], tf.uint8)}

    def decode(self, indices: Iterable[int]) -> np.ndarray:
        """int [B] -> uint8 [B, H, W, C]."""
        return np.stack([decode_image(self.paths[i], self.image_shape) for i in indices])


def load_folder(path: str, options: LoadOptions) -> ArraySource | FolderSource:
    """Every image file under a folder, in the byte order of the paths; hidden files and folders are left out."""
    source = FolderSource(_image_paths(path), options.image_shape, path)
    if options.fits_in_memory(source.num_examples):
        return ArraySource(source.decode(range(source.num_examples)), files=source.files)
    for image_path in source.paths:
        check_image(image_path, options.image_shape)  # a file that is not an image is reported now, not mid-run
    return source


def _image_paths(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        raise DataNotFoundError(f"The folder {folder!r} does not exist; expected folder:PATH.")
    paths: list[str] = []
    others: list[str] = []
    for root, subfolders, names in os.walk(folder):
        subfolders[:] = [f for f in subfolders if not f.startswith(".")]
        for name in names:
            if not name.startswith("."):
                (paths if name.lower().endswith(_SUFFIXES) else others).append(os.path.join(root, name))
    if others:
        raise InputError(
            f"{others[0]} is not an image by its name ({len(others)} such files, {len(paths)} images); "
            f"expected {' '.join(_SUFFIXES)}. Remove the other files or use another folder."
        )
    if not paths:
        raise InputError(f"The folder {folder!r} holds no images; expected files ending in {' '.join(_SUFFIXES)}.")
    return sorted(paths, key=os.fsencode)


def decode_image(path: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """One image file as uint8 [H, W, C]: turned upright, cut in the middle to the aspect ratio, then shrunk.

    Raises:
        InputError: a file that is not an image, is animated, has an alpha channel, more than 8 bits per channel or
            other colours than C channels hold, or is smaller than H x W.
    """
    height, width, channels = image_shape
    with _opened(path) as image:
        _check_header(path, image, image_shape)
        image = ImageOps.exif_transpose(image)
        image = image.convert("L" if channels == 1 else "RGB")
    if (image.height, image.width) != (height, width):
        image = _cut_to_aspect(image, width / height).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8).reshape(image_shape)


def check_image(path: str, image_shape: tuple[int, int, int]) -> None:
    """Raise the errors of `decode_image` that the file's header shows; the pixels are not read."""
    with _opened(path) as image:
        _check_header(path, image, image_shape)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except Exception as e:  # Pillow raises many kinds, OSError and SyntaxError among them
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise InputError(f"{path} ({size} bytes) cannot be read as an image: {e}. Repair or remove it.") from e


def _cut_to_aspect(image: Image.Image, aspect: float) -> Image.Image:
    """The largest middle part with width / height = aspect.

    The image is cut before it is shrunk, so that pixels outside the part do not blend into its border.
    """
    width, height = min(image.width, round(image.height * aspect)), min(image.height, round(image.width / aspect))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _check_header(path: str, image: Image.Image, image_shape: tuple[int, int, int]) -> None:
    height, width, channels = image_shape
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise InputError(f"{path} is animated ({frames} frames); expected one picture.")
    if image.has_transparency_data:
        raise InputError(f"{path} has an alpha channel; flatten it on a background first.")
    modes = {1: ("1", "L"), 3: ("RGB", "P", "CMYK", "YCbCr")}[channels]
    if image.mode not in modes:
        raise InputError(
            f"{path} has Pillow mode {image.mode}; images of {channels} channels are read from {' '.join(modes)}. "
            "Convert it, or ask for another number of channels."
        )
    # EXIF orientations 5 to 8 mean: stored on its side. Asking a PNG without EXIF for it would decode all of its pixels.
    is_on_its_side = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) >= 5
    size = (image.width, image.height) if is_on_its_side else (image.height, image.width)
    if size[0] < height or size[1] < width:
        raise InputError(
            f"{path} has {size[0]}x{size[1]} pixels; the images must have at least {height}x{width}, because they are "
            "never enlarged. Remove it, or ask for smaller images."
        )
