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

TEMPORARY, TRASH, OWNER = ".tmp-", ".trash-", ".owner"


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
            raise _in_use(path, owned) from None
        file.truncate(0)
        file.write(_owner())
        file.flush()
        yield


@contextlib.contextmanager
def owned_folder(path: str, owned: str) -> Iterator[None]:
    """As `owner_lock`, for an existing folder. The file that names the owner, `OWNER` in it, is deleted at the end.

    The lock is the folder's own: the file can be deleted without a second process taking the lock of a new one.
    """
    name = os.path.join(path, OWNER)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except BlockingIOError:
            raise _in_use(name, owned) from None
        with open(name, "w", encoding="utf-8") as file:
            file.write(_owner())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)


def _owner() -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"host {socket.gethostname()}, process {os.getpid()}, started {started}\n"


def _in_use(path: str, owned: str) -> WorkdirError:
    """The error for a lock that another process holds, whose name stands in the file `path`."""
    time.sleep(0.2)  # the owner may have got the lock a moment ago, and not have written its name yet
    owner = ""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        owner = file.read().strip()
    return WorkdirError(f"{owned}: {owner or 'its name is unknown'}. Wait, or use another.")


@contextlib.contextmanager
def made_folder(path: str) -> Iterator[None]:
    """Make a folder and its missing parents. If the block fails, those of them that are still empty are removed again."""
    missing, each = [], os.path.abspath(path)
    while not os.path.lexists(each):
        missing.append(each)
        each = os.path.dirname(each)
    try:
        os.makedirs(path, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):
                os.rmdir(each)
        raise
