"""The table of data sources, and `load_source`, which chooses from it."""

from typing import Any

from ddpm_tf.choices import Choice, choose
from ddpm_tf.data.arrays import ArraySource, load_digits, load_npz
from ddpm_tf.data.cifar import load_cifar10, load_cifar100
from ddpm_tf.data.contract import LoadOptions, Source
from ddpm_tf.data.folder import FolderSource, load_folder
from ddpm_tf.data.idx import load_idx
from ddpm_tf.data.tfds import load_tfds
from ddpm_tf.data.tfrecords import load_tfrecord
from ddpm_tf.errors import InputError

__all__ = ["SOURCES", "ArraySource", "FolderSource", "load_digits", "load_source"]

# {KIND: loader}, for sources written KIND or KIND:ARGUMENT. A loader is called with the argument and the options.
SOURCES = {
    "digits": Choice(load_digits),
    "folder": Choice(load_folder, ("convert", "background", "small", "animated", "bad", "bad_limit", "labels")),
    "npz": Choice(load_npz, ("range", "layout")),
    "idx": Choice(load_idx),
    "cifar10": Choice(load_cifar10),
    "cifar100": Choice(load_cifar100),
    "tfds": Choice(load_tfds),
    "tfrecord": Choice(load_tfrecord),
}

_NAMED = ("digits", "tfds")  # their arguments are no paths


def without_path(name: str) -> str:
    """The kind of a source that is given by a path; the whole name of another. Data are known by their contents."""
    kind = name.partition(":")[0]
    return name if kind in _NAMED else kind


def load_source(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    split: str = "train",
    data_dir: str = "",
    download: bool = False,
    in_memory_mb: int = 4096,
    read_only: bool = False,
    **settings: Any,
) -> Source:
    """A data source by name.

    Args:
        name: digits, folder:PATH, npz:PATH, idx:PATH, cifar10:PATH, cifar100:PATH, tfds:NAME or tfrecord:PATH.
        image_shape: (H, W, C). The images of a folder, and of a TFDS data set of varying sizes, are cut and shrunk to it. Other
            sources must have it.
        split: for tfds, idx, cifar10 and cifar100, the split to read.
        data_dir: for tfds, where data sets are prepared; "": TFDS' own default.
        download: for tfds, download and prepare a data set that is not there yet.
        in_memory_mb: data of at most this many MiB, decoded, are read at the start and kept in memory.
        read_only: write nothing, not even the index of a TFRecord file.
        settings: of the kind of source, see SOURCES and the fields of the config section `data`.

    Raises:
        DataNotFoundError: the data are not there.
        InputError: an unknown source or setting, or data that are empty, unreadable or of another shape.
    """
    kind, _, argument = name.partition(":")
    load = choose("data source", kind, SOURCES, settings)
    height, width, channels = image_shape
    options = LoadOptions((height, width, channels), split, data_dir, download, in_memory_mb, read_only)
    try:
        source = load(argument, options)
        if tuple(source.image_shape) != options.image_shape:
            raise InputError(f"The images have shape {list(source.image_shape)}, expected {list(image_shape)}.")
    except InputError as e:  # the loaders do not know which fields their arguments come from
        raise type(e)(
            f"{e}\nThe data are data.source={name!r}. Images of {height}x{width}x{channels} are expected by "
            "data.image_size, data.image_width and data.channels."
        ) from e
    return source
