"""Labels of a folder's pictures: by subfolder, or by a table beside them."""

import csv
import os
from collections.abc import Sequence

import numpy as np

from ddpm_tf import text
from ddpm_tf.data.listing import LABELS_FILE
from ddpm_tf.errors import InputError

LABELS = ("auto", "none", "folder", "csv")


def read_labels(how: str, folder: str, names: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """The label of every picture, and the names of the classes.

    Args:
        how: none; folder: the first subfolder of a picture's path; csv: the file labels.csv in `folder`; auto: csv if there is
            such a file, else folder if all pictures lie in two subfolders or more, else none.
        names: of the pictures, below `folder`.

    Returns:
        int64 [N], or None without labels; the name of class k at place k.

    Raises:
        InputError: labels that were asked for and are missing or cannot be read.
    """
    path = os.path.join(folder, LABELS_FILE)
    if how == "csv" or (how == "auto" and os.path.lexists(path)):
        return _numbered(_from_csv(path, names))
    subfolders = [name.partition(os.sep)[0] if os.sep in name else "" for name in names]
    if how == "folder" and (alone := subfolders.count("")):
        first = text.printable(names[subfolders.index("")])
        raise InputError(
            f"data.labels=folder takes a picture's subfolder for its class, but {alone:,} pictures of {folder} lie in no "
            f"subfolder, such as {first}. Move them into one, or set data.labels=none."
        )
    if how == "folder" or (how == "auto" and "" not in subfolders and len(set(subfolders)) > 1):
        return _numbered(subfolders)
    return None, []


def _numbered(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers for names: the names themselves if they are 0, 1, ..., else their places in the byte order."""
    classes = sorted(set(values), key=os.fsencode)
    if set(classes) == {str(k) for k in range(len(classes))}:
        classes.sort(key=int)
    places = {name: k for k, name in enumerate(classes)}
    return np.array([places[value] for value in values], np.int64), classes


def _from_csv(path: str, names: Sequence[str]) -> list[str]:
    """The column `label` of a CSV file, by its column `file`, in the order of `names`."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
            reader = csv.DictReader(f)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise InputError(
                    f"{path} has the columns {reader.fieldnames}; expected 'file' and 'label' in its first line."
                )
            rows = [(os.path.normpath(row["file"] or ""), row["label"]) for row in reader]
    except (OSError, csv.Error) as e:
        raise InputError(f"{path} cannot be read as labels: {e}. Mend it, or set data.labels=none.") from e
    labels = dict(rows)
    twice = len(rows) - len(labels)
    missing = [name for name in names if not labels.get(name)]
    gone = sorted(labels.keys() - set(names))
    if twice or missing or gone:
        raise InputError(
            f"{path} does not fit the pictures: {len(missing):,} pictures have no label{_such_as(missing)}, {len(gone):,} "
            f"names are of no picture{_such_as(gone)}, {twice:,} names stand there more than once. Mend it, or set "
            "data.labels=none."
        )
    return [labels[name] for name in names]


def _such_as(names: Sequence[str]) -> str:
    return f" (such as {text.printable(names[0])})" if names else ""
