"""Images in memory: arrays, .npz files, and scikit-learn's digits."""

import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from ddpm_tf.data.contract import LoadOptions, file_entries
from ddpm_tf.errors import DataNotFoundError, InputError


class ArraySource:
    """Images in memory, see `contract.Source`.

    Args:
        images: uint8 [N, H, W, C].
        labels: int [N], or None.
        files: (name, bytes) of the files that the arrays were read from.

    Raises:
        InputError: arrays of another type or shape, or no images.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | None = None, *, files: Sequence[tuple[str, int]] = ()
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
            raise InputError(f"Images must be uint8 [N, H, W, C], but are {images.dtype} {list(images.shape)}.")
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
                raise InputError(
                    f"Labels must be integers, one for each of the {len(images)} images, but are {labels.dtype} "
                    f"{list(labels.shape)}."
                )
        height, width, channels = images.shape[1:]
        self.num_examples, self.image_shape, self.files = len(images), (height, width, channels), files
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
    from sklearn.datasets import load_digits as load

    data = load()
    return ArraySource(np.minimum(data.images * 16, 255).astype(np.uint8)[..., None], data.target)


def load_npz(path: str, options: LoadOptions) -> ArraySource:
    """An .npz file with `images`, uint8 [N, H, W, C], and perhaps `labels`, int [N]."""
    if not os.path.isfile(path):
        raise DataNotFoundError(f"The file {path!r} does not exist; expected npz:PATH.")
    try:
        with np.load(path, allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
    except Exception as e:  # not a zip file, a pickle, a truncated member
        raise InputError(f"{path} cannot be read as an .npz file: {e}") from e
    if "images" not in arrays:
        raise InputError(f"{path} has the arrays {sorted(arrays)}; expected 'images' (uint8 [N, H, W, C]).")
    return ArraySource(arrays["images"], arrays.get("labels"), files=file_entries([path], os.path.dirname(path)))
