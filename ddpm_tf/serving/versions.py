"""Version folders NAME/1, NAME/2, ... They appear whole or not at all, and are never written over."""

import contextlib
import os
import re
from collections.abc import Iterator

import tensorflow as tf

from ddpm_tf import files
from ddpm_tf.errors import InputError, StorageError, WorkdirError


def list_versions(folder: str) -> list[int]:
    """The versions in a model's folder, ascending."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(name) for name in os.listdir(folder) if re.fullmatch(r"\d+", name))


def choose_version(folder: str, version: int | None = None) -> int:
    """The version to write: the given one, or the newest plus 1.

    Raises:
        InputError: a version that exists or is outside 1..2^63 - 1, or a folder that is a file.
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
            f"--out={folder} already has a version {version}, and nothing is written over. Leave out --version to write "
            f"{max(versions) + 1}."
        )
    return version


@contextlib.contextmanager
def new_version(folder: str, version: int) -> Iterator[str]:
    """Yield a temporary folder to fill. At the end of the block it becomes folder/version, on the disk and at once.

    Missing parents are made. Folders that killed exports left behind are removed. The temporary name is not a number, so
    that a polling server does not take it for a version.

    Raises:
        WorkdirError: the folder cannot be made or written to.
        StorageError: no space, or another error of the file system.
        InputError: another export wrote the version in the meantime.
    """
    target = os.path.join(folder, str(version))
    try:
        os.makedirs(folder, exist_ok=True)
        files.sweep(folder)
        temporary = contextlib.ExitStack()
        path = temporary.enter_context(files.atomic_folder(target))
    except OSError as e:
        raise WorkdirError(f"--out={folder} cannot be written to: {e}. Choose another, or change its rights.") from e
    try:
        with temporary:
            yield path
            if os.path.exists(target):
                raise InputError(
                    f"Another export wrote {target} in the meantime, and nothing is written over. Try again."
                )
    except (OSError, tf.errors.OpError) as e:
        raise StorageError(f"Version {version} cannot be written to {folder}: {e}. Make room and try again.") from e
