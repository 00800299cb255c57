"""Version folders NAME/1, NAME/2, ... They appear whole or not at all, and are never written over."""

import contextlib
import os
import re
from collections.abc import Iterator

import tensorflow as tf

from ddpm_tf import files
from ddpm_tf.errors import InputError, StorageError, WorkdirError
from ddpm_tf.paths import check_kind
from ddpm_tf.text import printable


def list_versions(folder: str) -> list[int]:
    """The versions in a model's folder, ascending."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(name) for name in os.listdir(folder) if re.fullmatch(r"\d+", name))


def choose_version(folder: str, version: int | None = None) -> int:
    """The version to write: the given one, or the newest plus 1.

    Raises:
        InputError: a version that exists or is outside 1..2^63 - 1, or something that is no folder.
    """
    check_kind(folder, f"--out={printable(folder)}", is_folder=True)
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

    Missing parents are made, and removed again if the block fails. Folders that killed exports left behind are removed. The
    temporary name is not a number, so that a polling server does not take it for a version.

    Raises:
        WorkdirError: the folder cannot be made or written to.
        StorageError: no space, or another error of the file system.
        InputError: another export wrote the version in the meantime.
    """
    target, is_made = os.path.join(folder, str(version)), False
    try:
        with files.made_folder(folder):
            files.sweep(folder)
            with files.atomic_folder(target) as path:
                is_made = True
                yield path
                if os.path.exists(target):
                    raise InputError(
                        f"Another export wrote {target} in the meantime, and nothing is written over. Try again."
                    )
    except (OSError, tf.errors.OpError) as e:
        if not is_made:
            raise WorkdirError(
                f"--out={folder} cannot be written to: {e}. Choose another, or change its rights."
            ) from e
        raise StorageError(f"Version {version} cannot be written to {folder}: {e}. Make room and try again.") from e
