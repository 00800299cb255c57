"""TensorFlow Datasets: image data sets by name."""

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from ddpm_tf import text
from ddpm_tf.data.arrays import ArraySource
from ddpm_tf.data.contract import Details, LoadOptions
from ddpm_tf.data.picture import fit
from ddpm_tf.errors import DataNotFoundError, InputError

if TYPE_CHECKING:  # importing it takes seconds, which runs on other data need not wait for
    import tensorflow_datasets as tfds

_NAMESPACES = ("huggingface", "kaggle")  # TFDS hands these to other packages


class TFDSSource:
    """A data set read by number from a file format with random access; see `contract.Source`.

    Args:
        builder: of the data set, prepared.
        split: a name of its splits, or a part of one in TFDS' syntax, such as train[:50%].
        image_shape: (H, W, C) that images of varying size are cut and shrunk to.
        examples: how examples become arrays.

    Raises:
        InputError: the data set is prepared in a format without random access.
    """

    def __init__(
        self, builder: "tfds.core.DatasetBuilder", split: str, image_shape: tuple[int, int, int], examples: "_Examples"
    ) -> None:
        try:
            self._data = builder.as_data_source(split=split)
        except NotImplementedError as e:
            raise InputError(
                f"{builder.info.full_name} takes more memory than in_memory_mb allows, and it is prepared in a format "
                f"without random access. Prepare it again by tfds build {builder.name} --file_format=array_record, or "
                "raise in_memory_mb."
            ) from e
        self.num_examples, self.image_shape = len(self._data), examples.image_shape
        self.files, self.details, self._examples = [_file_entry(builder, split)], examples.details, examples

    def read(self, indices: np.ndarray | tf.Tensor) -> dict[str, tf.Tensor]:
        """See `contract.Source.read`."""
        keys = self._examples.keys
        arrays = tf.numpy_function(self.decode, [indices], [tf.uint8, tf.int32][: len(keys)])
        arrays = arrays if isinstance(arrays, list | tuple) else [arrays]
        shapes = [[None, *self.image_shape], [None]]
        return {k: tf.ensure_shape(a, s) for k, a, s in zip(keys, arrays, shapes, strict=False)}

    def decode(self, indices: Sequence[int]) -> list[np.ndarray]:
        """[uint8 [B, H, W, C], and int32 [B] with labels]."""
        return self._examples.stack(self._data.__getitems__([int(i) for i in indices]))


class _Examples:
    """How the examples of a data set become arrays.

    Raises:
        InputError: features that are no images, or labels that are no classes.
    """

    def __init__(self, name: str, features: Any, image_shape: tuple[int, int, int]) -> None:
        if "image" not in features:
            raise InputError(f"The TFDS data set {name!r} has no 'image' feature, only {list(features)}.")
        shape = getattr(features["image"], "shape", ())
        dtype = tf.as_dtype(features["image"].dtype)
        if dtype != tf.uint8 or len(shape) != 3:
            raise InputError(
                f"'image' of the TFDS data set {name!r} is {dtype.name} {list(shape)}; expected uint8 images."
            )
        self.is_varying = None in shape
        self.image_shape = image_shape if self.is_varying else tuple(shape)
        self.keys, names = ["image"], []
        if "label" in features:
            label = features["label"]
            dtype = tf.as_dtype(label.dtype)
            self.is_text = dtype == tf.string
            if tuple(label.shape) != () or not (self.is_text or dtype.is_integer):
                found = f"{dtype.name} {list(label.shape)}"
                raise InputError(f"'label' of the TFDS data set {name!r} is {found}; expected one class per image.")
            self.keys.append("label")
            names = list(getattr(label, "names", []) or [])
        self.details = Details(names)

    def stack(self, examples: Iterable[dict[str, Any]]) -> list[np.ndarray]:
        """The arrays of some examples; a text label becomes its place among `details.class_names`."""
        images, labels = [], []
        for example in examples:
            image = np.asarray(example["image"])
            images.append(fit(image, self.image_shape) if self.is_varying else image)
            labels.append(example.get("label"))
        arrays = [np.stack(images).astype(np.uint8)]
        if "label" in self.keys:
            places = {name: k for k, name in enumerate(self.details.class_names)}
            arrays.append(np.array([places[_text(x)] if self.is_text else x for x in labels], np.int32))
        return arrays

    def name_classes(self, labels: Iterable[Any]) -> None:
        """Text labels get their numbers: their places in the byte order."""
        self.details = Details(sorted({_text(label) for label in labels}, key=os.fsencode))


def _text(label: Any) -> str:
    return os.fsdecode(label) if isinstance(label, bytes) else str(label)


def load_tfds(name: str, options: LoadOptions) -> ArraySource | TFDSSource:
    """An image data set of TensorFlow Datasets, by name (cifar10, celeb_a_hq/256); its images may vary in size."""
    builder = _prepared_builder(name, options)
    examples = _Examples(name, builder.info.features, options.image_shape)
    count = _num_examples(builder, options.split, name)
    if not options.fits_in_memory(count):
        if "label" in examples.keys and examples.is_text:
            raise InputError(
                f"The TFDS data set {name!r} has text for labels, which are numbered when the data are kept in "
                "memory. Raise data.in_memory_mb."
            )
        return TFDSSource(builder, options.split, options.image_shape, examples)
    rows = list(_rows(builder, options.split, examples.keys))
    if "label" in examples.keys and examples.is_text:
        examples.name_classes(row["label"] for row in rows)
    arrays = examples.stack(rows)
    return ArraySource(*arrays, files=[_file_entry(builder, options.split)], details=examples.details)


def _rows(builder: "tfds.core.DatasetBuilder", split: str, keys: list[str]) -> Iterable[dict[str, Any]]:
    """All examples of a split, in the order of the files."""
    import tensorflow_datasets as tfds

    try:
        dataset = builder.as_dataset(
            split=split, shuffle_files=False, read_config=tfds.ReadConfig(interleave_cycle_length=1)
        )
    except NotImplementedError:  # array_record: read by number
        return iter(builder.as_data_source(split=split))
    return dataset.map(lambda x: {k: x[k] for k in keys}).as_numpy_iterator()


def _num_examples(builder: "tfds.core.DatasetBuilder", split: str, name: str) -> int:
    """How many examples a split or a part of one has."""
    try:
        count = builder.info.splits[split].num_examples
    except Exception as e:  # KeyError and ValueError, of unknown names and of slices
        raise InputError(
            f"The TFDS data set {name!r} has no split {split!r}, only {list(builder.info.splits)}. "
            "Choose one of these, or a part of one, such as train[:50%]."
        ) from e
    if count < 1:
        raise InputError(f"The split {split!r} of the TFDS data set {name!r} has no examples.")
    return count


def _prepared_builder(name: str, options: LoadOptions) -> "tfds.core.DatasetBuilder":
    import tensorflow_datasets as tfds

    if name.partition(":")[0] in _NAMESPACES:
        raise InputError(
            f"tfds:{name}: TFDS reads this from another package. Save the images as a folder or an .npz file."
        )
    try:
        builder = tfds.builder(name, data_dir=options.data_dir or None)
    except Exception as e:  # no such data set, configuration or version; a namespace; a damaged dataset_info.json
        reason = text.printable(str(e).partition("\n")[0])
        raise InputError(f"There is no TFDS data set {name!r}: {reason}") from e
    if options.download and not builder.is_prepared():
        _check_hosts(builder, name)
        try:
            builder.download_and_prepare()
        except Exception as e:  # no network, another checksum, a missing file that has to be downloaded by hand
            raise InputError(f"The TFDS data set {name!r} cannot be downloaded and prepared: {e}") from e
    if not builder.is_prepared():
        data_dir = f" --data_dir={options.data_dir}" if options.data_dir else ""
        raise DataNotFoundError(
            f"The TFDS data set {name!r} is not prepared in {builder.data_path}. Run\n  tfds build {name}{data_dir}\n"
            "or allow the download (download=True; on the command line --download). Both need a network."
        )
    return builder


def _check_hosts(builder: "tfds.core.DatasetBuilder", name: str) -> None:
    """Refuse a download from hosts that have no address here. TFDS would try again for minutes."""
    if urllib.request.getproxies():  # then the proxy looks for the hosts
        return
    for host in sorted({urllib.parse.urlparse(url).hostname or "" for url in builder.url_infos}):
        try:
            socket.getaddrinfo(host, 443)
        except OSError as e:
            raise InputError(
                f"The TFDS data set {name!r} cannot be downloaded: no address of {host} can be found ({e}). Is there a "
                f"network? Else prepare it elsewhere and copy it to {builder.data_path}."
            ) from e


def _file_entry(builder: "tfds.core.DatasetBuilder", split: str) -> tuple[str, int]:
    """The one entry of `Source.files` that stands for all files of a split."""
    info = builder.info.splits[split]
    size = getattr(info, "num_bytes", None)
    return f"{builder.info.full_name}/{split}", info.num_examples if size is None else size
