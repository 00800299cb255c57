"""The pictures that a client saves."""

import os
from collections.abc import Iterable

import numpy as np

from ddpm_tf import files
from ddpm_tf import images as images_lib
from ddpm_tf.errors import StorageError, WorkdirError, storage_advice


def save_pngs(folder: str, seeds: Iterable[int], images: np.ndarray) -> None:
    """Write seed_NNNNNN.png for each image of uint8 [N, H, W, C], and grid.png of the first 256, into a new or empty folder."""
    make_new_folder(folder)
    try:
        for seed, image in zip(seeds, images, strict=True):
            _save_png(os.path.join(folder, f"seed_{seed:06d}.png"), image)
        _save_png(os.path.join(folder, "grid.png"), images_lib.picture(images[:256]))
    except OSError as e:
        raise StorageError(f"--out={folder} cannot be written: {e}. {storage_advice(e)}") from e


def _save_png(path: str, image: np.ndarray) -> None:
    with files.atomic_file(path, "wb", sync=False) as f:
        f.write(images_lib.png_bytes(image))


def make_new_folder(folder: str) -> None:
    files.check_new_folder(folder, "--out")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise WorkdirError(f"--out={folder} cannot be made: {e}. Choose another.") from e
