"""Checkpoints: immutable folders `step_%012d` that appear whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid

import numpy as np
import tensorflow as tf
from absl import logging

from ddpm_tf import __version__
from ddpm_tf.errors import InputError, NoValidCheckpointError, NumericsError, StorageError, storage_advice
from ddpm_tf.files import fsync
from ddpm_tf.storage.bundles import read_bundle, write_bundle

FORMAT = 2  # of a checkpoint folder; 1 had no counts of skipped steps

_STEP = re.compile(r"step_(\d{12})$")
_BUNDLE, _META, _MANIFEST = "state", "meta.json", "MANIFEST.json"
_ATTEMPTS = 3


def variables_by_name(model):
    """{name: variable} of everything a run needs to go on: network, EMA, the optimizer's slots, the step, the counts of
    skipped steps, and the loss scale.

    Names: network/PATH, ema/PATH, optimizer/SLOT/PATH (momentum and velocity are Adam's m and v), step, skipped/NAME,
    loss_scale/NAME.
    """
    named = {f"network/{v.path}": v for v in model.network.variables}
    named |= {f"ema/{v.path}": v for v in model.ema_network.variables}
    # Keras names a slot OPTIMIZER/PATH_WITH_UNDERSCORES_slot, and numbers the optimizers of a process.
    paths = {v.path.replace("/", "_"): v.path for v in model.network.trainable_variables}
    for v in model.optimizer.variables:
        if v is not model.optimizer.iterations:
            owner, _, slot = v.path.partition("/")[2].rpartition("_")
            named[f"optimizer/{slot}/{paths[owner]}"] = v
    named |= {
        "skipped/total": model.skipped_total,
        "skipped/in_a_row": model.skipped_in_a_row,
        "skipped/steps": model.skipped_steps,
        "loss_scale/scale": model.loss_scale.scale,
        "loss_scale/finite_steps": model.loss_scale.finite_steps,
    }
    return {**named, "step": model.optimizer.iterations}


def list_steps(folder):
    """The steps that have a checkpoint folder, ascending."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(m[1]) for m in map(_STEP.match, os.listdir(folder)) if m)


def step_folder(folder, step):
    return os.path.join(folder, f"step_{step:012d}")


def save(folder, step, tensors, meta, *, keep, keep_every=0):
    """Write a checkpoint into `folder`, then delete all but the newest `keep` and those of every `keep_every` steps.

    A folder `.tmp-*` is filled, its files and itself are brought to the disk, and it is renamed: whatever stops the
    program or the machine, the newest checkpoint that verifies is this one or the one before.

    Args:
        folder: the workdir's `ckpt`.
        step: completed steps.
        tensors: {name: array}.
        meta: what JSON can hold.
        keep: at least 1.
        keep_every: checkpoints of multiples of it are never deleted; 0: none.

    Raises:
        NumericsError: a tensor that is not finite; nothing is written then, and nothing is deleted.
        StorageError: no space, or another error of the file system, three times in a row; the litter is removed.
    """
    bad = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if bad:
        raise NumericsError(
            f"{bad[0]} is not finite after step {step} ({len(bad)} of {len(tensors)} tensors): not saved. The last "
            f"checkpoint in {folder} is kept; lower optimizer.learning_rate and start again from it."
        )

    def write():
        # Another folder each time: what a failed attempt has left cannot always be removed at once.
        temporary = os.path.join(folder, f".tmp-{step}-{uuid.uuid4().hex}")
        try:
            _write(temporary, tensors, meta)
            if os.path.isdir(step_folder(folder, step)):  # could not be read when the run went on from an older one
                os.rename(step_folder(folder, step), os.path.join(folder, f".trash-{step}-{uuid.uuid4().hex}"))
            os.rename(temporary, step_folder(folder, step))
            verify(step_folder(folder, step))  # before older ones are deleted
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    try:
        _retried(write, step)
        _retried(lambda: fsync(folder), step)
    except (OSError, tf.errors.OpError, InputError) as e:
        raise _storage_error(folder, step, tensors, e) from e
    sweep(folder)
    prune(folder, step, keep, keep_every)


def _retried(action, step):
    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except (OSError, tf.errors.OpError, InputError) as e:
            if attempt == _ATTEMPTS - 1 or is_full(e):
                raise
            logging.warning("Writing the checkpoint of step %d failed (%s); trying again.", step, e)
            time.sleep(2**attempt)


def prune(folder, step, keep, keep_every=0):
    """Delete checkpoints older than that of `step`, as `save` says: renamed first, so that a half-deleted one is never read.

    A newer one could not be read when the run went on from an older one: it does not count, and is left alone.
    """
    for old in [s for s in list_steps(folder) if s <= step][:-keep]:
        if keep_every and old % keep_every == 0:
            continue
        trash = os.path.join(folder, f".trash-{old}-{uuid.uuid4().hex}")
        try:
            os.rename(step_folder(folder, old), trash)
        except OSError as e:  # nothing is lost; the next save tries again
            logging.warning("The old checkpoint of step %d cannot be deleted: %s", old, e)
        shutil.rmtree(trash, ignore_errors=True)


def sweep(folder):
    """Remove the folders that crashes have left: `.tmp-*` and `.trash-*`. Only for the holder of the workdir's lock."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith((".tmp-", ".trash-")):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def restore_latest(folder, *, quarantine=False):
    """(step, {name: array}) of the newest checkpoint that verifies, or None where there is none at all.

    Args:
        folder: the workdir's `ckpt`.
        quarantine: rename folders that do not verify to `corrupt-*`; only for the holder of the workdir's lock.

    Raises:
        NoValidCheckpointError: there are checkpoints, and none verifies.
        InputError: the newest one was written in a format that this version does not read.
    """
    steps, problems = None, []
    while steps != list_steps(folder)[::-1]:  # once more, if folders were pruned under a reader
        steps, problems = list_steps(folder)[::-1], []
        for step in steps:
            found = _read(folder, step, quarantine, problems)
            if found is not None:
                return step, found
    if problems:
        raise NoValidCheckpointError(
            f"None of the {len(problems)} checkpoints in {folder} can be used:\n  " + "\n  ".join(problems) + "\n"
            "To give this run up and begin again at step 0: --restart_from_scratch, which moves it to old-TIME/."
        )
    if os.path.isdir(folder) and any(name.startswith("corrupt-") for name in os.listdir(folder)):
        raise NoValidCheckpointError(
            f"{folder} holds only checkpoints that were found damaged (corrupt-*). To begin again at step 0: "
            "--restart_from_scratch, which moves them to old-TIME/."
        )
    return None


def _read(folder, step, quarantine, problems):
    """The tensors of a checkpoint; None, and one more of `problems`, where it cannot be used."""
    path = step_folder(folder, step)
    try:
        verify(path)
    except InputError as e:
        problems.append(f"step {step}: {e}")
        logging.warning("The checkpoint of step %d cannot be used: %s", step, e)
        if quarantine and os.path.isdir(path):
            os.rename(path, os.path.join(folder, f"corrupt-{step}-{uuid.uuid4().hex}"))
        return None
    except OSError as e:
        return _unreadable(step, e, problems)
    try:
        meta = read_meta(folder, step)
        if meta["format"] == FORMAT:
            return read_bundle(os.path.join(path, _BUNDLE))
    except (InputError, OSError, ValueError, KeyError) as e:  # it verified a moment ago: not damaged
        return _unreadable(step, e, problems)
    return _check_format(path, meta)


def _unreadable(step, error, problems):
    """An error of reading says nothing of the checkpoint, which is left where it is."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        raise StorageError(f"The checkpoint of step {step} cannot be read: {error}. {storage_advice(error)}") from error
    problems.append(f"step {step}: {error}")
    logging.warning("The checkpoint of step %d cannot be read: %s", step, error)


def _check_format(path, meta):
    if meta["format"] > FORMAT:
        raise InputError(
            f"{path} was written by ddpm_tf {meta['version']} in checkpoint format {meta['format']}; this is "
            f"{__version__}, which reads format {FORMAT}. Upgrade ddpm_tf."
        )
    if meta["format"] < FORMAT:
        raise InputError(
            f"{path} was written in checkpoint format {meta['format']}, by a version before the first release; this is "
            f"{__version__}, which reads format {FORMAT}. Use the version it was written with."
        )


def read_meta(folder, step):
    """What was given as `meta` with the checkpoint of `step`, and its format, version and variables."""
    with open(os.path.join(step_folder(folder, step), _META)) as f:
        return json.load(f)


def verify(path):
    """Compare a checkpoint folder with its manifest, file by file.

    Raises:
        InputError: naming the file, with what was found and expected.
    """
    manifest = os.path.join(path, _MANIFEST)
    try:
        with open(manifest) as f:
            files = {name: (entry["size"], entry["sha256"]) for name, entry in json.load(f).items()}
    except FileNotFoundError:
        raise InputError(f"{manifest} is missing.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{manifest} cannot be read: {e}") from e
    if not {f"{_BUNDLE}.index", _META} <= files.keys():
        raise InputError(f"{manifest} names no {_BUNDLE}.index or no {_META}.")
    for name, (size, digest) in files.items():
        file = os.path.join(path, name)
        found = os.path.getsize(file) if os.path.isfile(file) else None
        if found != size:
            raise InputError(f"{file} has {found} bytes, expected {size}.")
        if _sha256(file) != digest:
            raise InputError(f"{file} has other contents than when it was written (SHA-256).")


def _write(temporary, tensors, meta):
    os.makedirs(temporary)
    variables = {name: f"{array.dtype.name} {list(array.shape)}" for name, array in tensors.items()}
    with open(os.path.join(temporary, _META), "w") as f:
        json.dump({"format": FORMAT, "version": __version__, **meta, "variables": variables}, f, indent=2)
    write_bundle(os.path.join(temporary, _BUNDLE), tensors)  # second: where no file can be opened, TensorFlow crashes
    paths = {name: os.path.join(temporary, name) for name in sorted(os.listdir(temporary))}
    manifest = {name: {"size": os.path.getsize(p), "sha256": _sha256(p)} for name, p in paths.items()}
    with open(os.path.join(temporary, _MANIFEST), "w") as f:
        json.dump(manifest, f, indent=2)
    for path in (*paths.values(), os.path.join(temporary, _MANIFEST), temporary):
        fsync(path)


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_full(error):
    """Out of space or over a file size limit: trying again at once does not help."""
    text = str(error)
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or any(
        word in text for word in ("No space left", "File too large", "quota")
    )


def check_space(folder, tensors):
    """Refuse to begin where the disk has no room for a checkpoint of these tensors, and 30 % more.

    Raises:
        StorageError: naming the bytes needed and free.
    """
    needed, free = round(1.3 * sum(a.nbytes for a in tensors.values())), shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder} has {free:,} bytes free; a checkpoint needs {needed:,} with 30 % to spare. Make room, or use "
            "another --workdir."
        )


def _storage_error(folder, step, tensors, error):
    needed, free = sum(np.asarray(a).nbytes for a in tensors.values()), shutil.disk_usage(os.path.dirname(folder)).free
    return StorageError(
        f"The checkpoint of step {step} cannot be written to {folder}: {error}. It needs {needed:,} bytes; {free:,} are "
        f"free. The checkpoints before it are kept. {storage_advice(error)}"
    )
