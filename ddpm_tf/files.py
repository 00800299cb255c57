"""Files and folders that appear whole or not at all, locks, and digests; no TensorFlow, no config.

A crash at any moment leaves the old content or the new one, and perhaps a temporary file or folder. Their names begin with
`.tmp-` or end with `.tmp`; `sweep` removes the folders.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from typing import IO

from ddpm_tf.errors import InputError, WorkdirError

TEMPORARY, TRASH = ".tmp-", ".trash-"


def fsync(path: str) -> None:
    """Write a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str, mode: str = "w", *, sync: bool = True) -> Iterator[IO]:
    """Open a temporary file beside `path`; at the end of the block it replaces `path`.

    Args:
        mode: "w" (UTF-8 text) or "wb".
        sync: wait until the disk has the file. False is faster. The file still appears whole, but a power cut may lose it.

    Raises:
        OSError: `path` is unchanged, and the temporary file is gone.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        fsync(os.path.dirname(path) or ".")


def write_text(path: str, text: str) -> None:
    """Write a text file; when this returns, the disk has it."""
    with atomic_file(path) as f:
        f.write(text)


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """Yield a temporary folder beside `path`; at the end of the block it becomes `path`, and the disk has all of it.

    The temporary folder is locked meanwhile, so that another process's `sweep` leaves it alone. The parent must exist.

    Raises:
        OSError: `path` is a file or a folder that is not empty, or the file system failed; the temporary folder is gone. `path`
            is unchanged or, if the disk could not be told of its new name, complete.
    """
    path = os.path.realpath(path)  # a link to an empty folder stays a link
    parent, name = os.path.split(path)
    temporary = os.path.join(parent, f"{TEMPORARY}{name}-{uuid.uuid4().hex}")
    try:
        os.mkdir(temporary)
        with locked(temporary):
            yield temporary
            for folder, _, names in os.walk(temporary):
                for each in (*names, ""):
                    fsync(os.path.join(folder, each))
            os.rename(temporary, path)
        fsync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(path: str) -> None:
    """Delete a folder. It is renamed first, so that nobody reads a folder of which half is deleted.

    Raises:
        OSError: it cannot be renamed; it is unchanged then.
    """
    parent, name = os.path.split(os.path.abspath(path))
    trash = os.path.join(parent, f"{TRASH}{name}-{uuid.uuid4().hex}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: str) -> None:
    """Delete the temporary folders that crashes left in `folder`; those that a living process fills are left alone."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if name.startswith((TEMPORARY, TRASH)):
            with contextlib.suppress(BlockingIOError, FileNotFoundError), locked(path):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock (`flock`) of an existing file or folder. The system frees it when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sha256(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_new_folder(path: str, name: str) -> None:
    """Refuse a path that exists, unless it is an empty folder; `name` is the flag or argument that gave it.

    Raises:
        InputError
    """
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise InputError(
            f"{name}={path} exists and is not an empty folder. Nothing is written over: choose another, or remove it."
        )


@contextlib.contextmanager
def owner_lock(path: str, owned: str) -> Iterator[None]:
    """Hold the lock of a file that says who holds it; the file is made if need be.

    Args:
        owned: what the lock is for, for the message, for example "--workdir=W is in use by another training".

    Raises:
        WorkdirError: another process holds it; the message says which.
        OSError: the file cannot be written.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)  # the owner may have got the lock a moment ago, and not have written its name yet
            file.seek(0)
            raise WorkdirError(f"{owned}: {file.read().strip()}. Wait, or use another.") from None
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"host {socket.gethostname()}, process {os.getpid()}, started {started}\n")
        file.flush()
        yield
