"""The folder that run_sample.py writes. It grows by batches, and a run that was killed goes on from the last whole batch.

images/seed_NNNNNN.png  one file per image
grid.png                the first images side by side
samples.npz             all images, and their labels if there are any
sampling.json           the settings; a start with other settings is refused
.samples.part           the pixels so far, while the run is not finished
.owner                  the process that writes, while it does
"""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddpm_tf import files, images, text
from ddpm_tf.errors import InputError, StorageError, WorkdirError, storage_advice
from ddpm_tf.paths import check_entries, check_kind, check_local
from ddpm_tf.storage.checkpoints import is_full

_SETTINGS, _PART, _SAMPLES, _GRID, _IMAGES = "sampling.json", ".samples.part", "samples.npz", "grid.png", "images"
_IN_GRID = 256  # images


def read_settings(path: str) -> dict[str, Any] | None:
    """The settings that a folder's images are drawn with, or None where it does not hold any."""
    try:
        with open(os.path.join(path, _SETTINGS), encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise InputError(f"{os.path.join(path, _SETTINGS)} cannot be read: {e}. Choose another folder.") from e


def is_finished(path: str) -> bool:
    return os.path.exists(os.path.join(path, _SAMPLES)) and not os.path.exists(os.path.join(path, _PART))


def check_out(path: str) -> None:
    """Refuse a path whose folder could not be used with any settings; write nothing.

    Raises:
        InputError
    """
    check_local(path, "--out")
    check_kind(path, f"--out={text.printable(path)}", is_folder=True)
    check_entries(path, {_SETTINGS: False, _PART: False, _SAMPLES: False, _GRID: False, _IMAGES: True})
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, _SETTINGS)):
        return
    if set(os.listdir(path)) - {f"{_SETTINGS}.tmp", files.OWNER}:
        raise InputError(
            f"--out={path} exists and is not an empty folder. Nothing is written over: choose another, or remove it."
        )


@contextlib.contextmanager
def open_folder(path: str, settings: dict[str, Any], image_shape: tuple[int, ...]) -> Iterator["SampleFolder"]:
    """Hold a folder for one run: a new or empty one, or one that an earlier start with the same settings left.

    Args:
        settings: all that the files depend on, as JSON can hold it; among them num_images, batch_size and png (whether one
            file per image is written).

    Raises:
        InputError: a folder of something else, or one of other settings; the message says what differs.
        WorkdirError: a folder that cannot be written to, or that another process writes to; the message names the process.
        StorageError: the disk is full.
    """
    check_out(path)
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(path, exist_ok=True)
            stack.enter_context(files.owned_folder(path, f"--out={path} is in use by another process"))
            earlier = read_settings(path)
            if earlier is None:
                files.write_text(os.path.join(path, _SETTINGS), json.dumps(settings, indent=2) + "\n")
        except OSError as e:
            if is_full(e):
                raise StorageError(f"--out={path} cannot be written to: {e}. {storage_advice(e)}") from e
            raise WorkdirError(f"--out={path} cannot be written to: {e}. Choose another.") from e
        if earlier is not None and earlier != settings:
            names = [n for n in {**earlier, **settings} if earlier.get(n) != settings.get(n)]
            rows = [(n, earlier.get(n), settings.get(n)) for n in names]
            table = text.table(rows, header=("setting", "in the folder", "now")).replace("\n", "\n  ")
            raise InputError(
                f"--out={path} was begun with other settings:\n  {table}\nUse the same "
                "settings and the same checkpoint, or another folder."
            )
        yield SampleFolder(path, settings, image_shape)


class SampleFolder:
    """Writes batches; see `open_folder`.

    Attributes:
        num_done: how many images are there from earlier starts, a multiple of the batch size, or all.
    """

    def __init__(self, path: str, settings: dict[str, Any], image_shape: tuple[int, ...]) -> None:
        num_images, batch_size = settings["num_images"], settings["batch_size"]
        self._path, self._png, self._shape = path, settings["png"], (num_images, *image_shape)
        self._part = os.path.join(path, _PART)
        if is_finished(path):
            self.num_done = num_images
            return
        size = int(np.prod(image_shape))
        there = os.path.getsize(self._part) // size if os.path.exists(self._part) else 0
        # Whole batches only: how an image is rounded may depend on the batch that it is drawn in.
        self.num_done = num_images if there >= num_images else there // batch_size * batch_size
        with open(self._part, "ab") as f:
            f.truncate(self.num_done * size)
        if self._png:
            os.makedirs(os.path.join(path, _IMAGES), exist_ok=True)

    def add(self, seeds: np.ndarray, batch: np.ndarray) -> None:
        """Write the next batch, uint8 [n, H, W, C]. It counts once its pixels are in .samples.part."""
        if self._png:
            for seed, image in zip(seeds.tolist(), batch, strict=True):
                name = os.path.join(self._path, _IMAGES, f"seed_{seed:06d}.png")
                with files.atomic_file(name, "wb", sync=False) as f:
                    f.write(images.png_bytes(image))
        with open(self._part, "ab") as f:
            f.write(np.ascontiguousarray(batch).tobytes())

    def finish(self, labels: np.ndarray | None, *, columns: int | None = None) -> None:
        """Write the grid, of so many columns, and samples.npz, once all images are there."""
        if is_finished(self._path):
            return
        pixels = np.memmap(self._part, np.uint8, "r", shape=self._shape)
        with files.atomic_file(os.path.join(self._path, _GRID), "wb") as f:
            f.write(images.png_bytes(images.picture(np.asarray(pixels[:_IN_GRID]), columns=columns)))
        del pixels
        with files.atomic_file(os.path.join(self._path, _SAMPLES), "wb") as f:
            _write_npz(f, self._part, self._shape, labels)
        os.unlink(self._part)


def _write_npz(file: Any, part: str, shape: tuple[int, ...], labels: np.ndarray | None) -> None:
    """What `np.savez(file, images=..., (labels=...))` writes, without holding the images."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member, open(part, "rb") as pixels:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            shutil.copyfileobj(pixels, member, 1 << 20)
        if labels is not None:
            with archive.open("labels.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, labels)
