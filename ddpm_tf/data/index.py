"""An index of a folder of pictures: what each file is, so that the next start is fast and changed bytes are noticed.

`python -m ddpm_tf.data.check folder:PATH --write_index` makes it, as PATH/.ddpm_tf_index.jsonl, one JSON object a line.
"""

import json
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from absl import logging

from ddpm_tf import files, text
from ddpm_tf.data.listing import Entry
from ddpm_tf.data.picture import PictureOptions
from ddpm_tf.errors import InputError

NAME = ".ddpm_tf_index.jsonl"


class Row(NamedTuple):
    """What the index holds of one file.

    options: the PictureOptions that the file passed with, as text.
    """

    name: str
    size: int
    mtime_ns: int
    sha256: str
    format: str
    mode: str
    height: int
    width: int
    options: str


class Index:
    """Which files have passed with some options; small, since a folder may hold a million.

    Args:
        folder: its index is read. One that is missing or damaged knows nothing: every file is looked at then.
    """

    def __init__(self, folder: str, options: PictureOptions) -> None:
        self._known: set[int] = set()
        try:
            for row in read_rows(folder):
                if row.options == key(options):
                    self._known.add(hash(row[:3]))
        except InputError as e:
            self._known.clear()
            logging.warning("%s Every picture is looked at.", e)

    def knows(self, entry: Entry) -> bool:
        """Whether the file has passed, and has had its size and time since."""
        return hash(tuple(entry)) in self._known


def key(options: PictureOptions) -> str:
    """Options as text, to be compared."""
    return repr(tuple(options))


def read_rows(folder: str) -> Iterator[Row]:
    """The rows of a folder's index; none if it has no index.

    Raises:
        InputError: an index that cannot be read.
    """
    path = os.path.join(folder, NAME)
    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="ascii") as f:
            for line in f:
                yield Row(*json.loads(line))
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"{text.printable(path)} cannot be read ({e}); make it again by --write_index.") from e


def write_index(folder: str, rows: Iterable[Row]) -> str:
    """Write the index of a folder, whole or not at all; returns its path.

    Raises:
        OSError
    """
    path = os.path.join(folder, NAME)
    with files.atomic_file(path) as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path
