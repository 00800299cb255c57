"""Folders of picture files."""

import concurrent.futures
import functools
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm

from ddpm_tf import text
from ddpm_tf.checks import real
from ddpm_tf.choices import one_of
from ddpm_tf.data.arrays import ArraySource
from ddpm_tf.data.contract import Details, LoadOptions
from ddpm_tf.data.index import Index
from ddpm_tf.data.labels import LABELS, read_labels
from ddpm_tf.data.listing import Entry, list_images
from ddpm_tf.data.picture import (
    ANIMATED,
    BACKGROUND,
    CONVERT,
    SMALL,
    PictureError,
    PictureOptions,
    SkippedError,
    decode,
    decode_image,
    examine,
)
from ddpm_tf.data.problems import Problem, settle, table
from ddpm_tf.errors import InputError

BAD = ("error", "skip")
_LOG_SECONDS = 10.0


class FolderSource:
    """Picture files, decoded at every read; see `contract.Source`.

    Args:
        root: the folder.
        files: (name below root, bytes) of the files, in the order in which they are numbered.
        options: how pictures become images.
        labels: int [N], or None.
        details: see `contract.Details`.
    """

    def __init__(
        self,
        root: str,
        files: Sequence[tuple[str, int]],
        options: PictureOptions,
        *,
        labels: np.ndarray | None = None,
        details: Details = Details(),  # noqa: B008 - immutable
    ) -> None:
        self.num_examples, self.image_shape = len(files), options.image_shape
        self.files, self.details = files, details
        self._root, self._options, self._pool = root, options, _pool()
        self._labels = None if labels is None else tf.constant(labels, tf.int32)

    def read(self, indices: np.ndarray | tf.Tensor) -> dict[str, tf.Tensor]:
        """See `contract.Source.read`."""
        batch = {"image": tf.numpy_function(self.decode, [indices], tf.uint8)}
        return batch if self._labels is None else batch | {"label": tf.gather(self._labels, indices)}

    def decode(self, indices: Iterable[int]) -> np.ndarray:
        """int [B] -> uint8 [B, H, W, C]."""
        paths = [os.path.join(self._root, self.files[i][0]) for i in indices]
        return np.stack(list(self._pool.map(lambda path: decode_image(path, self._options), paths)))


def load_folder(
    path: str,
    options: LoadOptions,
    *,
    convert: str = "auto",
    background: str = "white",
    small: str = "refuse",
    animated: str = "refuse",
    bad: str = "error",
    bad_limit: float = 0.01,
    labels: str = "auto",
) -> ArraySource | FolderSource:
    """Every picture below a folder, in the byte order of the names; the settings are those of the config section `data`.

    Raises:
        DataNotFoundError: no such folder.
        InputError: files that cannot be used, all in one list; labels that do not fit; an unknown setting.
    """
    chosen = {"convert": convert, "background": background, "small": small, "animated": animated, "bad": bad}
    check_settings({**chosen, "bad_limit": bad_limit, "labels": labels})
    listing = list_images(path)
    for note in listing.notes:
        logging.warning("%s.", note)
    names = [entry.name for entry in listing.entries]
    numbers, classes = read_labels(labels, path, names)
    how = PictureOptions(options.image_shape, convert, background, small, animated)
    if options.fits_in_memory(len(names)):
        taken = _decode_all(path, names, how)
    else:
        taken = _examine_all(path, listing.entries, how, is_full=bad == "skip")
    problems = listing.problems + taken.problems
    settle(problems, bad=bad, limit=bad_limit, total=len(names) + len(listing.problems))
    if not taken.kept.any():
        raise InputError(f"The folder {path!r} holds no picture that can be used:\n{table(problems + taken.skipped)}")
    details = _details(path, taken, problems, classes)
    files = [(entry.name, entry.size) for entry, kept in zip(listing.entries, taken.kept, strict=True) if kept]
    if numbers is not None:
        numbers = numbers[taken.kept]
    if taken.images is None:
        return FolderSource(path, files, how, labels=numbers, details=details)
    images = taken.images if taken.kept.all() else taken.images[taken.kept]
    return ArraySource(images, numbers, files=files, details=details)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of `load_folder` that it does not know.

    Raises:
        InputError
    """
    known = {
        "convert": CONVERT,
        "background": BACKGROUND,
        "small": SMALL,
        "animated": ANIMATED,
        "bad": BAD,
        "labels": LABELS,
    }
    one_of({f"data.{name}": (settings[name], values) for name, values in known.items()})
    real("data.bad_limit", settings["bad_limit"], low=0, high=1)


class Taken(NamedTuple):
    """What became of the pictures of a folder.

    images: uint8 [N, H, W, C], of those that were kept; None where they were not decoded. kept: bool [N]. notes: how many were
    converted in which way. problems: of pictures that cannot be used. skipped: of those that the options leave out.
    """

    images: np.ndarray | None
    kept: np.ndarray
    notes: Counter[str]
    problems: list[Problem]
    skipped: list[Problem]


def _decode_all(root: str, names: Sequence[str], how: PictureOptions) -> Taken:
    images = np.empty((len(names), *how.image_shape), np.uint8)

    def take(k: int) -> list[str]:
        images[k], notes = decode(os.path.join(root, names[k]), how)
        return notes

    return take_all(take, len(names), "decoding")._replace(images=images)


def _examine_all(root: str, entries: Sequence[Entry], how: PictureOptions, *, is_full: bool) -> Taken:
    """Report files that are no pictures now, and not in the middle of a run. Those that the index knows are not opened.

    Args:
        is_full: decode the pictures too. A file whose header is whole can be left out now, but not in the middle of a run.
    """
    index = Index(root, how)
    unknown = [k for k, entry in enumerate(entries) if not index.knows(entry)]

    def take(j: int) -> list[str]:
        path = os.path.join(root, entries[unknown[j]].name)
        if is_full:
            return decode(path, how)[1]
        examine(path, how)
        return []

    taken = take_all(take, len(unknown), "examining")
    kept = np.ones(len(entries), bool)
    kept[unknown] = taken.kept
    return taken._replace(kept=kept)


def take_all(take: Callable[[int], list[str]], count: int, verb: str) -> Taken:
    """Call `take` for all numbers below `count`, on all cores.

    Args:
        take: of a picture's number; returns its notes. A PictureError of it becomes a problem.
        verb: what is done, for the progress bar.
    """
    kept, notes = np.zeros(count, bool), Counter[str]()
    problems: list[Problem] = []
    skipped: list[Problem] = []

    def attempt(k: int) -> Any:
        try:
            return take(k)
        except PictureError as e:
            return e

    with _pool() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata
        for k, result in enumerate(_progress(_map(pool, attempt, count), count, verb)):
            if isinstance(result, PictureError):
                (skipped if isinstance(result, SkippedError) else problems).append(result.problem)
            else:
                kept[k] = True
                notes.update(result)
    return Taken(None, kept, notes, problems, skipped)


def _pool() -> concurrent.futures.ThreadPoolExecutor:
    """A thread per core that this process may use: decoders run outside Python's lock."""
    return concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def _map(pool: concurrent.futures.Executor, function: Callable[[int], Any], count: int) -> Iterator[Any]:
    """As pool.map(function, range(count)); only some thousand calls wait at once."""
    for begin in range(0, count, 4096):
        yield from pool.map(function, range(begin, min(begin + 4096, count)))


def _progress(results: Iterable[Any], total: int, verb: str) -> Iterator[Any]:
    """The results, with a bar on a terminal and lines in the log elsewhere."""
    started = last = time.monotonic()
    for done, result in enumerate(
        tqdm(results, total=total, unit=" pictures", desc=verb, disable=None, leave=False), 1
    ):
        yield result
        if (now := time.monotonic()) - last > _LOG_SECONDS and not sys.stderr.isatty():
            rate, last = done / (now - started), now
            minutes, seconds = divmod(round((total - done) / rate), 60)
            logging.info(
                "%s: %d of %d pictures, %.0f a second, %d:%02d left", verb, done, total, rate, minutes, seconds
            )


def _details(path: str, taken: Taken, problems: Sequence[Problem], classes: Sequence[str]) -> Details:
    """The details of the source; logged as a table, if there is anything to tell."""
    left_out = [*problems, *taken.skipped]
    rows = [(f"{n:,}", note) for note, n in taken.notes.most_common()]
    rows += [(f"{n:,}", f"left out: {kind}") for kind, n in Counter(p.kind for p in left_out).most_common()]
    if rows:
        what = "Pictures of %s (%s of %s are used):\n%s"
        logging.info(what, path, f"{taken.kept.sum():,}", f"{len(taken.kept):,}", text.table(rows, right=[0]))
    if problems:
        logging.warning("data.bad=skip leaves out %d files; data.json names them:\n%s", len(problems), table(problems))
    relative = functools.partial(os.path.relpath, start=path)
    return Details(list(classes), dict(taken.notes), [(relative(p.path), p.kind, p.detail) for p in left_out])
