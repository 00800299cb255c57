"""The files below a folder: which are pictures, in which order, and what is wrong with the others."""

import os
import stat
from typing import NamedTuple

from ddpm_tf import text
from ddpm_tf.data.picture import SUFFIXES
from ddpm_tf.data.problems import Problem
from ddpm_tf.errors import DataNotFoundError, InputError
from ddpm_tf.paths import kind_of

LABELS_FILE = "labels.csv"
# What systems leave in folders, beside names that begin with a dot; in lower case.
_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")


class Entry(NamedTuple):
    """One picture file: its path below the folder, bytes, and time of change in nanoseconds."""

    name: str
    size: int
    mtime_ns: int


class Listing(NamedTuple):
    """What a folder holds.

    entries: the pictures, in the byte order of their names. problems: of files that are no pictures, or cannot be opened.
    notes: what was left out on purpose, as sentences.
    """

    entries: list[Entry]
    problems: list[Problem]
    notes: list[str]


def list_images(folder: str) -> Listing:
    """All picture files below a folder. Hidden names and the litter of systems are left out.

    A link to a folder is followed, if that folder has not been visited yet. Thus no folder is read twice, and a loop ends.

    Raises:
        DataNotFoundError: there is no such folder.
        InputError: no pictures and no other files.
    """
    if not os.path.isdir(folder):
        found = "is a file" if os.path.exists(folder) else "does not exist"
        raise DataNotFoundError(f"The folder {folder!r} {found}; expected folder:PATH, a folder of pictures.")
    listing, links, visited = Listing([], [], []), [""], set[tuple[int, int]]()
    for name in links:  # grows: links are followed after the folders themselves, so that a picture's own path wins
        links += _walk(folder, name, visited, listing)
    if not listing.entries and not listing.problems:
        raise InputError(f"The folder {folder!r} holds no images; expected files ending in {' '.join(SUFFIXES)}.")
    listing.entries.sort(key=lambda entry: os.fsencode(entry.name))
    return listing


def _walk(root: str, start: str, visited: set[tuple[int, int]], listing: Listing) -> list[str]:
    """Add what lies below one folder, links to folders apart; returns those links, sorted."""
    links: list[str] = []
    names = [start]
    while names:
        name = names.pop()
        folder = os.path.join(root, name) if name else root
        try:
            status = os.stat(folder)
            if (identity := (status.st_dev, status.st_ino)) in visited:
                listing.notes.append(f"{text.printable(folder)} leads to a folder that is read already: not read again")
                continue
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda e: os.fsencode(e.name))
        except OSError as e:
            listing.problems.append(Problem(folder, "folder", e.strerror or ""))
            continue
        visited.add(identity)
        for entry in found:
            if entry.name.startswith(".") or entry.name.lower() in _LITTER:
                continue
            path = os.path.join(name, entry.name)
            is_link = entry.is_symlink()
            if (
                os.path.isdir(os.path.join(root, path)) if is_link else entry.is_dir()
            ):  # isdir: False for a link to itself
                (links if is_link else names).append(path)
            else:
                _add_file(root, path, listing)
    return sorted(links, key=os.fsencode)


def _add_file(root: str, name: str, listing: Listing) -> None:
    path = os.path.join(root, name)
    try:
        status = os.stat(path)
    except OSError as e:
        kind = "dangling" if os.path.islink(path) else "damaged"
        listing.problems.append(Problem(path, kind, e.strerror or ""))
        return
    if name == LABELS_FILE and stat.S_ISREG(status.st_mode):
        return
    if not name.lower().endswith(SUFFIXES):
        listing.problems.append(Problem(path, "name"))
    elif not stat.S_ISREG(status.st_mode):
        listing.problems.append(Problem(path, "irregular", kind_of(status.st_mode)))
    else:
        listing.entries.append(Entry(name, status.st_size, status.st_mtime_ns))
