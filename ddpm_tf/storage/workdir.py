"""Workdirs: what they hold, and what is never written over."""

import contextlib
import fcntl
import os
import shutil
import socket
import time
import uuid

from ddpm_tf import config as config_lib
from ddpm_tf.errors import InputError, WorkdirError
from ddpm_tf.storage import checkpoints

_PROBES = (".tmp-probe", ".tmp-probe-renamed")
_BEFORE_CONFIG = {
    ".lock",
    "ckpt",
    "samples",
    "data.json",
    "data.json.tmp",
}  # what a run that was killed at once may have left


def read_config(workdir, *, flag="--workdir"):
    """The config a workdir was made with; `flag` named it.

    Raises:
        InputError: no such workdir, or no usable config.json.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.isfile(path):
        what = "holds no config.json" if os.path.isdir(workdir) else "does not exist"
        raise InputError(f"{flag}={workdir} {what}; expected a folder written by run_train.py.")
    with open(path, encoding="utf-8", errors="replace") as f:  # what is no text is no JSON either
        return config_lib.from_json(f.read(), path)


def newest(workdir):
    """(step, {name: array}) of a workdir's newest checkpoint."""
    folder = os.path.join(workdir, "ckpt")
    latest = checkpoints.restore_latest(folder)
    if latest is None:
        raise InputError(f"There is no checkpoint in {folder} yet. Train longer, or lower train.checkpoint_every.")
    return latest


def check_new(path, flag):
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise InputError(f"{flag}={path} exists and is not an empty folder; nothing is written over. Choose another.")


@contextlib.contextmanager
def locked(workdir):
    """Hold a workdir for training: made if need be, tried for writing, and locked against a second trainer.

    The lock is `flock` on `.lock`, which the system frees when the process ends, however it ends; the file says who
    holds it.

    Raises:
        WorkdirError: a workdir that cannot be written to, or in which another process trains (its owner is named).
    """
    path = os.path.join(workdir, ".lock")
    try:
        os.makedirs(os.path.join(workdir, "ckpt"), exist_ok=True)
        os.makedirs(os.path.join(workdir, "samples"), exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - closing it frees the lock
    except OSError as e:
        raise _not_writable(workdir, e) from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)  # it may have got the lock a moment ago, and not have said yet who it is
            file.seek(0)
            raise WorkdirError(
                f"--workdir={workdir} is in use by another training: {file.read().strip()}. Wait, or use another workdir."
            ) from None
        try:
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"host {socket.gethostname()}, process {os.getpid()}, started {started}\n")
            file.flush()
            _try_writing(workdir)
        except OSError as e:
            raise _not_writable(workdir, e) from e
        yield


def _not_writable(workdir, error):
    return WorkdirError(f"--workdir={workdir} cannot be written to: {error}. Choose another, or change its rights.")


def check_writable(workdir):
    """Refuse a workdir that cannot be written to, before anything is read or built; makes nothing.

    Raises:
        WorkdirError
    """
    path = os.path.abspath(workdir)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.access(path, os.W_OK | (os.X_OK if os.path.isdir(path) else 0)):
        raise WorkdirError(
            f"--workdir={workdir} cannot be written to: no right to write in {path}, or it is read-only. Choose another, or "
            "change its rights."
        )


def _try_writing(workdir):
    """Create, fsync, rename and delete a file; the next start takes away what a kill in between leaves."""
    probe, renamed = (os.path.join(workdir, name) for name in _PROBES)
    with open(probe, "w") as f:
        f.write("x")
        f.flush()
        os.fsync(f.fileno())
    os.rename(probe, renamed)
    os.unlink(renamed)


def check_workdir(config, workdir, *, fresh=False):
    """Refuse a folder of something else, and a run whose fixed fields differ; `fresh`: what it holds is to be moved away."""
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise InputError(f"--workdir={workdir} is a file; expected a folder.")
    if not os.path.exists(os.path.join(workdir, "config.json")):
        if checkpoints.list_steps(os.path.join(workdir, "ckpt")) and not fresh:
            raise InputError(
                f"--workdir={workdir} has checkpoints but no config.json; restore it or use another workdir."
            )
        foreign = sorted(set(os.listdir(workdir)) - _BEFORE_CONFIG) if os.path.isdir(workdir) else []
        if fresh and any(
            name.startswith("old-") for name in foreign
        ):  # a restart that was stopped while it moved things
            return
        foreign = [name for name in foreign if not name.startswith((".tmp-", "config.json", "old-"))]
        if foreign:
            raise InputError(
                f"--workdir={workdir} holds {foreign[0]!r} and no config.json: it is no workdir of this program, and nothing "
                "is written over. Use a new or an empty folder."
            )
        return
    if fresh:
        return
    check_same(read_config(workdir), config, f"--workdir={workdir}")


def check_same(old, config, origin):
    """Refuse fixed fields that differ, with a table."""
    changed = [d for d in config_lib.differences(old, config) if not d[0].free]
    if changed:
        rows = "\n".join(f"  {field.path:<28} {old!r:>20} {new!r:>20}" for field, old, new in changed)
        raise InputError(
            f"{origin} was made with another config; these fields cannot change when a run goes on:\n"
            f"  {'field':<28} {'workdir':>20} {'now':>20}\n{rows}\nUse another workdir, or the workdir's values."
        )


def write_workdir(workdir, config, tensors):
    """A workdir with one checkpoint, which appears whole or not at all."""
    temporary = f"{os.path.abspath(workdir)}.tmp-{uuid.uuid4().hex}"
    try:
        os.makedirs(os.path.join(temporary, "samples"))
        with open(os.path.join(temporary, "config.json"), "w") as f:
            f.write(config_lib.to_json(config))
        step = int(tensors["step"])
        meta = {"config": config.to_dict(), "time": time.time()}
        checkpoints.save(os.path.join(temporary, "ckpt"), step, tensors, meta, keep=1)
        os.makedirs(workdir, exist_ok=True)
        os.replace(temporary, workdir)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WorkdirError(f"--workdir={workdir} cannot be written: {e}. Choose another.") from e
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
