"""What every data source promises, and what the function that loads one is given."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import tensorflow as tf


class Details(NamedTuple):
    """What a source tells beside its images, for data.json.

    class_names: the name of class k at place k; empty where the labels have no names.
    notes: {how images were converted: how many}.
    left_out: (file, kind of problem, detail) of each file that is not used.
    """

    class_names: Sequence[str] = ()
    notes: Mapping[str, int] = {}
    left_out: Sequence[tuple[str, str, str]] = ()


class Source(Protocol):
    """Images by number. The numbering is fixed: the same data give every example the same number at every start."""

    @property
    def num_examples(self) -> int:
        """How many examples there are, at least 1."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""

    @property
    def files(self) -> Sequence[tuple[str, int]]:
        """(name, bytes) of each file that is read, in the order in which the examples are numbered.

        A name does not depend on where the data are stored. Empty for images that are in no file of the user's.
        """

    @property
    def details(self) -> Details:
        """What data.json tells beside `files`."""

    def read(self, indices: np.ndarray | tf.Tensor) -> dict[str, tf.Tensor]:
        """Some examples, eagerly or inside a tf.data pipeline. Several threads may call it at once.

        Args:
            indices: int [B], numbers of examples, in any order, repeated or not.

        Returns:
            {"image": uint8 [B, H, W, C]}, with "label": int32 [B] for data that have labels.
        """


class LoadOptions(NamedTuple):
    """The settings of `load_source` that a loader may need; explained there."""

    image_shape: tuple[int, int, int]
    split: str
    data_dir: str
    download: bool
    in_memory_mb: int
    read_only: bool

    def fits_in_memory(self, num_examples: int) -> bool:
        """Whether so many decoded images take no more than in_memory_mb."""
        return num_examples * math.prod(self.image_shape) <= self.in_memory_mb * 2**20


def file_entries(paths: Iterable[str], root: str) -> list[tuple[str, int]]:
    """`Source.files` of these paths: (name relative to root, bytes), in the order given."""
    return [(os.path.relpath(path, root), os.path.getsize(path)) for path in paths]
