"""Version folders NAME/1, NAME/2, ...: they appear whole or not at all, and are never written over."""

import contextlib
import fcntl
import os
import re
import shutil
import uuid

import tensorflow as tf

from ddpm_tf.errors import InputError, StorageError, WorkdirError
from ddpm_tf.files import fsync

_TEMPORARY = ".tmp-"  # no number, so that no polling server takes it for a version


def list_versions(folder):
    """The versions that a model's folder has, ascending."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(name) for name in os.listdir(folder) if re.fullmatch(r"\d+", name))


def choose_version(folder, version=None):
    """The version to write: the given one, or the one after the newest.

    Raises:
        InputError: a version that exists or is no positive 63-bit number, or a folder that is a file.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"--out={folder} is a file; expected the folder of a model, MODELS/NAME.")
    versions = list_versions(folder)
    if version is None:
        version = max(versions, default=0) + 1
    if not 1 <= version < 2**63:
        raise InputError(f"--version must be within 1..2^63 - 1, found {version}.")
    if version in versions:
        raise InputError(
            f"--out={folder} has a version {version} already, and nothing is written over. Leave --version out for "
            f"{max(versions) + 1}."
        )
    return version


@contextlib.contextmanager
def new_version(folder, version):
    """A temporary folder to fill, which becomes folder/version at the end of the block, on the disk and at once.

    Missing parents are made. What exports that were killed have left is removed: every export holds a lock on its
    temporary folder, which the system frees when the process ends, however it ends.

    Raises:
        WorkdirError: a folder that cannot be made or written to.
        StorageError: no space, or another error of the file system.
        InputError: another export has written the version in the meantime.
    """
    temporary = os.path.join(folder, f"{_TEMPORARY}{version}-{uuid.uuid4().hex}")
    try:
        os.makedirs(folder, exist_ok=True)
        _sweep(folder)
        os.mkdir(temporary)
    except OSError as e:
        raise WorkdirError(f"--out={folder} cannot be written to: {e}. Choose another, or change its rights.") from e
    try:
        with _locked(temporary):
            yield temporary
            for path, _, files in os.walk(temporary):
                for name in (*files, ""):
                    fsync(os.path.join(path, name))
            _publish(temporary, folder, version)
    except (OSError, tf.errors.OpError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"Version {version} cannot be written to {folder}: {e}. Make room and try again.") from e
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary, folder, version):
    target = os.path.join(folder, str(version))
    if os.path.exists(target):
        raise InputError(f"Another export has written {target} in the meantime; nothing is written over. Try again.")
    os.rename(temporary, target)
    fsync(folder)


def _sweep(folder):
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(_TEMPORARY):
            with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(path):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
