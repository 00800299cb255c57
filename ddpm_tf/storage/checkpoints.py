"""The checkpoints of a run: folders `step_%012d` that appear whole or not at all, and never change."""

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from ddpm_tf import files
from ddpm_tf.errors import InputError, NoValidCheckpointError, NumericsError, StorageError, storage_advice
from ddpm_tf.storage import checkpoint_folder
from ddpm_tf.storage.checkpoint_folder import NewerFormatError, fill, read_tensors, verify

_STEP = re.compile(r"step_(\d{12})$")
_ATTEMPTS = 3


def list_steps(folder: str | os.PathLike) -> list[int]:
    """The steps that have a checkpoint folder, ascending."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(m[1]) for m in map(_STEP.match, os.listdir(folder)) if m)


def step_folder(folder: str | os.PathLike, step: int) -> str:
    """The path of a step's checkpoint folder."""
    return os.path.join(folder, f"step_{step:012d}")


def save(
    folder: str | os.PathLike,
    step: int,
    tensors: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int = 0,
) -> None:
    """Write a checkpoint, verify it, and then delete older ones.

    The checkpoint appears by one rename, after the disk has its files. At any moment, also after a crash or a power cut,
    the newest checkpoint that verifies is this one or the one before.

    Args:
        folder: the workdir's `ckpt`; it is made if it is missing.
        step: completed steps.
        tensors: {name: array}.
        meta: more entries of meta.json, of types that JSON can hold.
        keep: how many of the newest checkpoints stay, at least 1.
        keep_every: checkpoints whose step is a multiple of it are never deleted; 0: none.

    Raises:
        NumericsError: a tensor is not finite. Nothing is written and nothing is deleted.
        StorageError: the disk is full, or another error of the file system came three times in a row. The older
            checkpoints are kept, and the temporary folder is gone.
    """
    bad = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if bad:
        raise NumericsError(
            f"{bad[0]} is not finite after step {step} ({len(bad)} of {len(tensors)} tensors): nothing was saved. The last "
            f"checkpoint in {folder} is kept. Lower the learning rate and start again from it."
        )
    for attempt in range(_ATTEMPTS):
        try:
            _write(step_folder(folder, step), tensors, meta)
            break
        except (OSError, tf.errors.OpError, InputError) as e:
            if attempt == _ATTEMPTS - 1 or is_full(e):
                raise _storage_error(folder, step, tensors, e) from e
            logging.warning("Writing the checkpoint of step %d failed (%s); trying again.", step, e)
            time.sleep(2**attempt)
    prune(folder, step, keep, keep_every)


def _write(path: str, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with files.atomic_folder(path) as temporary:
        fill(temporary, tensors, meta)
        # An attempt that failed late may have left a checkpoint here. Or this run could not read it, and resumed from an
        # older one.
        if os.path.isdir(path):
            files.discard(path)
    verify(path)


def prune(folder: str | os.PathLike, step: int, keep: int, keep_every: int = 0) -> None:
    """Delete old checkpoints, as `save` describes, and the temporary folders that crashes left.

    Checkpoints after `step` do not count and are left alone: this run could not read them, and resumed from an older one.
    """
    with _tolerated(f"Deleting the temporary folders in {folder}"):
        files.sweep(os.fspath(folder))
    for old in [s for s in list_steps(folder) if s <= step][:-keep]:
        if keep_every and old % keep_every == 0:
            continue
        with _tolerated(f"Deleting the old checkpoint of step {old}"):
            files.discard(step_folder(folder, old))


@contextlib.contextmanager
def _tolerated(task: str) -> Iterator[None]:
    """Log an error of deleting instead of raising it: nothing is lost."""
    try:
        yield
    except OSError as e:
        logging.warning("%s failed: %s. The next save tries again.", task, e)


def restore_latest(folder: str | os.PathLike, *, quarantine: bool = False) -> tuple[int, dict[str, np.ndarray]] | None:
    """Read the newest checkpoint that verifies.

    Tensors that its format lacks get the values that a new run begins with.

    Args:
        folder: the workdir's `ckpt`.
        quarantine: rename folders that do not verify to `corrupt-*`. Only the holder of the workdir's lock may do that.

    Returns:
        (step, {name: array}), or None where there is no checkpoint folder at all.

    Raises:
        NoValidCheckpointError: there are checkpoints, and none verifies.
        NewerFormatError: a newer version of ddpm_tf wrote the newest one that is not damaged.
    """
    steps: list[int] | None = None
    problems: list[str] = []
    while steps != list_steps(folder)[::-1]:  # again, if a trainer wrote or deleted checkpoints during the loop
        steps, problems = list_steps(folder)[::-1], []
        for step in steps:
            tensors = _read(folder, step, quarantine, problems)
            if tensors is not None:
                return step, tensors
    if problems:
        raise NoValidCheckpointError(
            f"None of the {len(problems)} checkpoints in {folder} can be used:\n  " + "\n  ".join(problems) + "\n"
            "To give this run up and begin again at step 0: --restart_from_scratch, which moves it to old-TIME/."
        )
    if os.path.isdir(folder) and any(name.startswith("corrupt-") for name in os.listdir(folder)):
        raise NoValidCheckpointError(
            f"All checkpoints in {folder} are damaged; they were renamed to corrupt-*. To begin again at step 0: "
            "--restart_from_scratch, which moves them to old-TIME/."
        )
    return None


def _read(folder: str | os.PathLike, step: int, quarantine: bool, problems: list[str]) -> dict[str, np.ndarray] | None:
    """The tensors of a checkpoint. If it cannot be used: None, and the reason is appended to `problems`."""
    path = step_folder(folder, step)
    try:
        verify(path)
    except NewerFormatError:
        raise
    except InputError as e:
        problems.append(f"step {step}: {e}")
        logging.warning("The checkpoint of step %d cannot be used: %s", step, e)
        if quarantine and os.path.isdir(path):
            os.rename(path, os.path.join(folder, f"corrupt-{step}-{uuid.uuid4().hex}"))
        return None
    except OSError as e:
        _unreadable(step, e, problems)
        return None
    try:
        return read_tensors(path)
    except (InputError, OSError, ValueError, KeyError) as e:  # not damage: it verified a moment ago
        _unreadable(step, e, problems)
        return None


def _unreadable(step: int, error: Exception, problems: list[str]) -> None:
    """Report an error of reading. It does not prove damage, so the checkpoint keeps its name."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        raise StorageError(f"The checkpoint of step {step} cannot be read: {error}. {storage_advice(error)}") from error
    problems.append(f"step {step}: {error}")
    logging.warning("The checkpoint of step %d cannot be read: %s", step, error)


def read_meta(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """The content of the meta.json of a step: what `save` got as `meta`, and format, version and variables."""
    return checkpoint_folder.read_meta(step_folder(folder, step))


def is_full(error: Exception) -> bool:
    """Whether the disk, a quota or a file size limit is full, so that trying again at once does not help."""
    text = str(error)
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or any(
        word in text for word in ("No space left", "File too large", "quota")
    )


def check_space(folder: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuse to begin if the disk has no room for a checkpoint of these tensors and 30 % more.

    Raises:
        StorageError: the message names the bytes needed and free.
    """
    needed, free = round(1.3 * sum(a.nbytes for a in tensors.values())), shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder} has {free:,} bytes free; a checkpoint needs {needed:,} with 30 % to spare. Make room, or use "
            "another workdir."
        )


def _storage_error(
    folder: str | os.PathLike, step: int, tensors: Mapping[str, np.ndarray], error: Exception
) -> StorageError:
    needed, free = sum(np.asarray(a).nbytes for a in tensors.values()), shutil.disk_usage(os.path.dirname(folder)).free
    return StorageError(
        f"The checkpoint of step {step} cannot be written to {folder}: {error}. It needs {needed:,} bytes; {free:,} are "
        f"free. The checkpoints before it are kept. {storage_advice(error)}"
    )
