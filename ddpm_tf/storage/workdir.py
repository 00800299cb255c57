"""Workdirs: the folder of a run, with config.json, data.json, metrics.jsonl, ckpt/, samples/ and tensorboard/."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ddpm_tf import config as config_lib
from ddpm_tf import files
from ddpm_tf.errors import InputError, WorkdirError
from ddpm_tf.paths import check_entries, check_kind, check_local
from ddpm_tf.storage import checkpoints
from ddpm_tf.text import printable

_PROBES = (".tmp-probe", ".tmp-probe-renamed")
# What a run opens, {name: whether it is a folder}.
_ENTRIES = {
    ".lock": False, "config.json": False, "data.json": False, "evaluation.json": False, "metrics.jsonl": False,
    "ckpt": True, "nan_dump": True, "samples": True, "tensorboard": True,
}  # fmt: skip


def checkpoints_folder(workdir: str) -> str:
    return os.path.join(workdir, "ckpt")


def samples_folder(workdir: str) -> str:
    return os.path.join(workdir, "samples")


def config_path(workdir: str) -> str:
    return os.path.join(workdir, "config.json")


def data_path(workdir: str) -> str:
    return os.path.join(workdir, "data.json")


def read_class_names(workdir: str) -> list[str]:
    """The name of class k at place k, of the data that the workdir was trained on; empty where they have no names."""
    path = data_path(workdir)
    if not os.path.exists(path):  # of imported weights
        return []
    try:
        with open(path, encoding="utf-8") as f:
            return [str(name) for name in json.load(f).get("class_names", [])]  # files before 0.3.0 do not have them
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise InputError(f"{path} cannot be read ({e}). Restore it, or remove it.") from e


def check_path(workdir: str, flag: str = "--workdir") -> None:
    """Refuse a path that cannot be a workdir's, and one where a file or folder of a run is something else; read nothing.

    Args:
        flag: named the workdir.

    Raises:
        InputError
    """
    check_local(workdir, flag)
    check_kind(workdir, f"{flag}={printable(workdir)}", is_folder=True)
    check_entries(workdir, _ENTRIES)


def read_config(workdir: str, *, flag: str = "--workdir") -> ConfigDict:
    """The config that a workdir was made with; `flag` named the workdir.

    Raises:
        InputError: no such workdir, or no usable config.json.
    """
    check_path(workdir, flag)
    path = config_path(workdir)
    if not os.path.isfile(path):
        what = "holds no config.json" if os.path.isdir(workdir) else "does not exist"
        raise InputError(f"{flag}={workdir} {what}; expected a folder written by run_train.py.")
    with open(path, encoding="utf-8", errors="replace") as f:  # a file that is no text is no JSON either
        return config_lib.from_json(f.read(), path)


def read_newest(workdir: str) -> tuple[int, dict[str, np.ndarray]]:
    """(step, {name: array}) of a workdir's newest checkpoint that verifies.

    Raises:
        InputError: there is no checkpoint yet. NoValidCheckpointError: none verifies.
    """
    folder = checkpoints_folder(workdir)
    latest = checkpoints.restore_latest(folder)
    if latest is None:
        raise InputError(f"There is no checkpoint in {folder} yet. Train longer, or lower train.checkpoint_every.")
    with contextlib.suppress(FileNotFoundError):  # a trainer may have deleted it since
        check_meta(checkpoints.read_meta(folder, latest[0]), f"The checkpoint of step {latest[0]} in {workdir}")
    return latest


def check_meta(meta: Mapping[str, Any], origin: str) -> ConfigDict | None:
    """The config in a checkpoint's meta.json, if there is one.

    Raises:
        InputError: it has fields that this version does not know.
    """
    if "config" not in meta:
        return None
    # config.json says already what the fields mean that an older version lacks.
    return config_lib.from_json(json.dumps(meta["config"]), origin, version=meta.get("version"), log=logging.debug)


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Hold a workdir for training: make it if need be, lock it against a second trainer, and try to write to it.

    Raises:
        WorkdirError: it cannot be written to, or another process trains in it (the message names that process).
    """
    with contextlib.ExitStack() as stack:
        try:
            for folder in (checkpoints_folder(workdir), samples_folder(workdir)):
                os.makedirs(folder, exist_ok=True)
            lock = os.path.join(workdir, ".lock")
            stack.enter_context(files.owner_lock(lock, f"--workdir={workdir} is in use by another training"))
            _try_writing(workdir)
        except OSError as e:
            raise _not_writable(workdir, e) from e
        yield


def _not_writable(workdir: str, error: OSError) -> WorkdirError:
    return WorkdirError(f"--workdir={workdir} cannot be written to: {error}. Choose another, or change its rights.")


def check_writable(workdir: str) -> None:
    """Refuse a workdir that cannot be written to, before anything is read or built; make nothing.

    Raises:
        InputError: as `check_path`.
        WorkdirError
    """
    check_path(workdir)
    path = os.path.abspath(workdir)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.access(path, os.W_OK | (os.X_OK if os.path.isdir(path) else 0)):
        raise WorkdirError(
            f"--workdir={workdir} cannot be written to: no right to write in {path}, or it is read-only. Choose another, or "
            "change its rights."
        )


def _try_writing(workdir: str) -> None:
    """Create, fsync, rename and delete a file. If a kill in between leaves it, the next start replaces it."""
    probe, renamed = (os.path.join(workdir, name) for name in _PROBES)
    with open(probe, "w") as f:
        f.write("x")
        f.flush()
        os.fsync(f.fileno())
    os.rename(probe, renamed)
    os.unlink(renamed)


def write_workdir(workdir: str, config: ConfigDict, tensors: Mapping[str, np.ndarray]) -> None:
    """A workdir with one checkpoint, which appears whole or not at all.

    Args:
        tensors: {name: array}, as `DiffusionModel.state` names them.

    Raises:
        WorkdirError: it cannot be written.
    """
    meta = {"config": config.to_dict(), "time": time.time()}
    try:
        with files.made_folder(os.path.dirname(os.path.abspath(workdir))), files.atomic_folder(workdir) as folder:
            os.makedirs(samples_folder(folder))
            files.write_text(config_path(folder), config_lib.to_json(config))
            checkpoints.save(checkpoints_folder(folder), int(tensors["step"]), tensors, meta, keep=1)
    except OSError as e:
        raise WorkdirError(f"--workdir={workdir} cannot be written: {e}. Choose another.") from e
