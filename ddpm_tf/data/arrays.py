"""Images in memory: arrays, .npz files, and scikit-learn's digits."""

import os
import zipfile
from collections.abc import Sequence
from typing import IO

import numpy as np
import tensorflow as tf
from absl import logging

from ddpm_tf import text
from ddpm_tf.checks import integers, memory
from ddpm_tf.choices import one_of
from ddpm_tf.data.contract import Details, LoadOptions, file_entries
from ddpm_tf.data.reading import open_regular
from ddpm_tf.errors import InputError

RANGES = {"uint8": (0, 255), "0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0)}
ADVICE = "Use fewer images at once, or a source that is read piece by piece (folder, tfrecord)."
LAYOUTS = ("channels_last", "channels_first")


class ArraySource:
    """Images in memory, see `contract.Source`.

    Args:
        images: uint8 [N, H, W, C].
        labels: int [N] at least 0, or None.
        files: (name, bytes) of the files that the arrays were read from.
        details: see `contract.Details`.

    Raises:
        InputError: arrays of another type or shape, no images, or labels that int32 does not hold.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        files: Sequence[tuple[str, int]] = (),
        details: Details = Details(),  # noqa: B008 - immutable
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
            raise InputError(f"Images must be uint8 [N, H, W, C], but are {images.dtype} {list(images.shape)}.")
        if labels is not None:
            labels = integers("labels", labels, low=0, high=2**31 - 1, shape=(len(images),))
        height, width, channels = images.shape[1:]
        self.num_examples, self.image_shape = len(images), (height, width, channels)
        self.files, self.details = files, details
        with tf.device("CPU"):
            self.tensors = {"image": tf.constant(images)}
            if labels is not None:
                self.tensors["label"] = tf.constant(labels, tf.int32)

    def read(self, indices: np.ndarray | tf.Tensor) -> dict[str, tf.Tensor]:
        """See `contract.Source.read`."""
        return {name: tf.gather(tensor, indices) for name, tensor in self.tensors.items()}


def load_digits(argument: str = "", options: LoadOptions | None = None) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, 8x8x1; the grey levels 0..16 become 16 x, at most 255.

    Both arguments are there because every loader has them; this one needs neither.
    """
    if argument:
        raise InputError(f"data.source=digits takes no argument, but {argument!r} stands behind its colon.")
    from sklearn.datasets import load_digits as load

    data = load()
    images = np.minimum(data.images * 16, 255).astype(np.uint8)[..., None]
    return ArraySource(images, data.target, details=Details([str(name) for name in data.target_names]))


def load_npz(path: str, options: LoadOptions, *, range: str = "uint8", layout: str = "channels_last") -> ArraySource:
    """An .npz file with images [N, H, W, C] or [N, H, W], and perhaps labels, int [N].

    The arrays are `images` and `labels`, or `arr_0` and `arr_1`, or `x_SPLIT` and `y_SPLIT` (Keras' mnist.npz); no pickle is
    read.

    Args:
        range: of the values: uint8; or 0..1 or -1..1, of floats, which are rounded to 256 grey levels.
        layout: channels_last; or channels_first, of images [N, C, H, W].
    """
    one_of({"data.range": (range, tuple(RANGES)), "data.layout": (layout, LAYOUTS)})
    names = [("images", "labels"), ("arr_0", "arr_1"), (f"x_{options.split}", f"y_{options.split}")]
    with open_regular(path, "npz:PATH") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.namelist()
                name, label_name = next(((a, b) for a, b in names if f"{a}.npy" in members), ("", ""))
                if name:
                    images = _read_member(archive, name, path)
                    labels = _read_member(archive, label_name, path) if f"{label_name}.npy" in members else None
        except InputError:
            raise
        except Exception as e:  # no zip file, a pickle, a truncated member, an error of a decompressor
            raise InputError(f"{text.printable(path)} cannot be read as an .npz file: {text.printable(str(e))}") from e
    if not name:
        expected = " or ".join(repr(a) for a, _ in names)
        raise InputError(
            f"{text.printable(path)} has the arrays {[m.removesuffix('.npy') for m in members]}; expected {expected}."
        )
    if layout == "channels_first" and images.ndim == 4:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 3:
        images = images[..., None]
    if (
        labels is not None
        and label_name == "arr_1"
        and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1])
    ):
        logging.warning("%s: arr_1 is no labels (%s %s); it is not used.", path, labels.dtype, list(labels.shape))
        labels = None
    if labels is not None and labels.shape == (len(images), 1):  # Keras' CIFAR
        labels = labels[:, 0]
    return ArraySource(_to_uint8(images, range, name), labels, files=file_entries([path], os.path.dirname(path)))


def _read_member(archive: zipfile.ZipFile, name: str, path: str) -> np.ndarray:
    """An array of an .npz file. Its size is looked at before memory is taken."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        shape, dtype, begin = _read_header(member)
    size = int(np.prod(np.array(shape, dtype=object), initial=1)) * dtype.itemsize
    if dtype.hasobject:
        raise InputError(
            f"{text.printable(path)}: {name} is an array of Python objects; expected numbers. Save it anew."
        )
    if info.file_size != begin + size:
        raise InputError(
            f"{text.printable(path)}: {name} has {info.file_size:,} bytes; its header says {list(shape)} {dtype}, "
            f"{begin + size:,} bytes. The file is damaged."
        )
    memory(f"{text.printable(path)}: {name}", size, ADVICE)
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type, and where the data begin, of an .npy file."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype, member.tell()


def _to_uint8(images: np.ndarray, range: str, name: str) -> np.ndarray:
    """Images of the range that was given, as uint8 where they are floats."""
    if (images.dtype == np.uint8) == (range == "uint8") and images.dtype.kind in "uf":
        if range == "uint8":
            return images
        low, high = RANGES[range]
        out = np.empty(images.shape, np.uint8)
        for k, image in enumerate(images):
            if not (image.min() >= low - 1e-6 and image.max() <= high + 1e-6):  # also of NaN
                raise InputError(
                    f"Image {k} of {name} has values from {image.min():g} to {image.max():g}, but data.range={range}."
                )
            out[k] = np.clip(np.rint((image.astype(np.float64) - low) / (high - low) * 255), 0, 255)
        return out
    if images.dtype.kind == "f" and images.size:
        values = f"with values from {images.min():g} to {images.max():g}"
        raise InputError(
            f"The images in {name} are {images.dtype} {values}; say their range by data.range=0..1 or -1..1."
        )
    expected = "uint8" if range == "uint8" else f"floats, as data.range={range} says"
    raise InputError(f"The images in {name} are {images.dtype} {list(images.shape)}; expected {expected}.")
