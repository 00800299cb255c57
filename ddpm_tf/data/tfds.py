"""TensorFlow Datasets: image data sets by name."""

from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from ddpm_tf.data.arrays import ArraySource
from ddpm_tf.data.contract import LoadOptions
from ddpm_tf.errors import DataNotFoundError, InputError

if TYPE_CHECKING:  # importing it takes seconds, which runs on other data need not wait for
    import tensorflow_datasets as tfds


class TFDSSource:
    """A data set read by number from a file format with random access; see `contract.Source`.

    Args:
        builder: of the data set, prepared.
        split: a name of its splits.
        keys: the features that are read: ["image"] or ["image", "label"].

    Raises:
        InputError: the data set is prepared in a format without random access.
    """

    def __init__(self, builder: "tfds.core.DatasetBuilder", split: str, keys: list[str]) -> None:
        try:
            self._data = builder.as_data_source(split=split)
        except NotImplementedError as e:
            raise InputError(
                f"{builder.info.full_name} takes more memory than in_memory_mb allows, and it is prepared in a format "
                f"without random access. Prepare it again by tfds build {builder.name} --file_format=array_record, or "
                "raise in_memory_mb."
            ) from e
        self.num_examples, self.image_shape = len(self._data), builder.info.features["image"].shape
        self._keys, self.files = keys, [_file_entry(builder, split)]

    def read(self, indices: np.ndarray | tf.Tensor) -> dict[str, tf.Tensor]:
        """See `contract.Source.read`."""
        arrays = tf.numpy_function(self._read, [indices], [tf.uint8, tf.int32][: len(self._keys)])
        arrays = arrays if isinstance(arrays, list | tuple) else [arrays]
        shapes = [[None, *self.image_shape], [None]]
        return {k: tf.ensure_shape(a, s) for k, a, s in zip(self._keys, arrays, shapes, strict=False)}

    def _read(self, indices: np.ndarray) -> list[np.ndarray]:
        examples = self._data.__getitems__(indices.tolist())
        dtypes = {"image": np.uint8, "label": np.int32}
        return [np.stack([x[k] for x in examples]).astype(dtypes[k]) for k in self._keys]


def load_tfds(name: str, options: LoadOptions) -> ArraySource | TFDSSource:
    """An image data set of TensorFlow Datasets, by name (cifar10, celeb_a_hq/256)."""
    import tensorflow_datasets as tfds

    builder = _prepared_builder(name, options)
    if "image" not in builder.info.features:
        raise InputError(f"The TFDS data set {name!r} has no 'image' feature, only {list(builder.info.features)}.")
    keys = [k for k in ("image", "label") if k in builder.info.features]
    if options.split not in builder.info.splits:
        raise InputError(
            f"The TFDS data set {name!r} has no split {options.split!r}, only {list(builder.info.splits)}. "
            "Choose one of these."
        )
    if options.fits_in_memory(builder.info.splits[options.split].num_examples):
        read_config = tfds.ReadConfig(interleave_cycle_length=1)  # the order of the files
        dataset = builder.as_dataset(split=options.split, shuffle_files=False, read_config=read_config)
        examples = list(dataset.map(lambda x: {k: x[k] for k in keys}).as_numpy_iterator())
        arrays = (np.stack([x[k] for x in examples]) for k in keys)
        return ArraySource(*arrays, files=[_file_entry(builder, options.split)])
    return TFDSSource(builder, options.split, keys)


def _prepared_builder(name: str, options: LoadOptions) -> "tfds.core.DatasetBuilder":
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=options.data_dir or None)
    except (ValueError, AssertionError, KeyError) as e:  # no such data set, configuration or version
        reason = str(e).partition("\n")[0]
        raise InputError(f"There is no TFDS data set {name!r}: {reason}") from e
    if options.download and not builder.is_prepared():
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


def _file_entry(builder: "tfds.core.DatasetBuilder", split: str) -> tuple[str, int]:
    """The one entry of `Source.files` that stands for all files of a split."""
    return f"{builder.info.full_name}/{split}", builder.info.splits[split].num_bytes
