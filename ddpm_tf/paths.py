"""Paths that a user gives: what is refused before any work, and names that TensorFlow takes as they are."""

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping

from ddpm_tf.errors import InputError
from ddpm_tf.text import printable

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PATTERN = re.compile(r"[\[\]*?\\]")
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def check_local(path: str, name: str) -> None:
    """Refuse a path that Python and TensorFlow would not take for the same place on this machine.

    Python takes every path for a local one. TensorFlow takes SCHEME:// for another file system, and all else for UTF-8.

    Args:
        name: the flag or argument that gave the path.

    Raises:
        InputError
    """
    if not path or "\0" in path:
        raise InputError(f"{name} is {path!r}, which is no path; expected the path of a local file or folder.")
    if match := _URL.match(path):
        raise InputError(
            f"{name}={printable(path)} is an address ({match[0]}), and only local files and folders are read and written. "
            "Give a local path, and copy from or to the address yourself, or mount it."
        )
    for each in (path, os.path.realpath(path)):  # a link, or the current folder, may have such a name too
        try:
            is_utf8 = os.fsencode(each) == each.encode("utf-8")
        except UnicodeEncodeError:
            is_utf8 = False
        if not is_utf8:
            target = "" if each == path else f" leads to {ascii(each)}, which"
            raise InputError(
                f"{name}={printable(path)}{target} is not written in UTF-8, and TensorFlow opens no other paths. Rename what "
                "has such a name, or choose another."
            )


def check_kind(path: str, name: str, *, is_folder: bool) -> None:
    """Refuse what is neither a file nor a folder, as wanted; a path where nothing is passes.

    Reading a named pipe would wait for ever.

    Args:
        name: how a message names the path.
        is_folder: a folder is wanted, else a regular file.

    Raises:
        InputError
    """
    if not os.path.lexists(path):
        return
    wanted = "folder" if is_folder else "regular file"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        found = f"a link to {printable(os.readlink(path))}, which does not exist"
    except OSError as e:
        found = f"a link that cannot be followed ({e.strerror})"
    else:
        if stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode):
            return
        found = kind_of(mode)
    raise InputError(f"{name} is {found}; expected a {wanted}. Move it away, or choose another path.")


def kind_of(mode: int) -> str:
    """What lies at a path, by its `st_mode`."""
    return _KINDS.get(stat.S_IFMT(mode), "a device")


def check_entries(folder: str, entries: Mapping[str, bool]) -> None:
    """`check_kind` of some names in a folder, {name: whether a folder is wanted}.

    Raises:
        InputError
    """
    for entry, is_folder in entries.items():
        path = os.path.join(folder, entry)
        check_kind(path, printable(path), is_folder=is_folder)


def is_literal(path: str) -> bool:
    """Whether TensorFlow reads a path as it is written, see `literal`."""
    return not _PATTERN.search(path)


@contextlib.contextmanager
def literal(path: str) -> Iterator[str]:
    r"""Yield a path to the same files that TensorFlow reads as it is written.

    TensorFlow takes `[`, `]`, `*`, `?` and `\` in the path of a checkpoint or a SavedModel for a pattern
    (tensorflow#34290), and does not find the file. A path with one of them is replaced by a link in a temporary folder.

    Args:
        path: a file, a folder, or what the names of several files begin with, as the prefix of a checkpoint is. All of them
            are linked.

    Raises:
        InputError: the temporary folder's own path has such a character.
    """
    if is_literal(path):
        yield path
        return
    folder, name = os.path.split(os.path.abspath(path))
    with tempfile.TemporaryDirectory() as links:
        if not is_literal(links):
            raise InputError(
                f"The folder of temporary files, {links}, and {printable(path)} both have one of [ ] * ? \\ in their path, "
                "which TensorFlow takes for a pattern. Set TMPDIR to a folder without them."
            )
        for each in os.listdir(folder):
            if each.startswith(name):
                os.symlink(os.path.join(folder, each), os.path.join(links, f"plain{each.removeprefix(name)}"))
        yield os.path.join(links, "plain")
