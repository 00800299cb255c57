"""Where images come from. A source has num_examples, image_shape, read(indices) -> {"image", ("label")}, and `files`,
[(name, bytes)] of what it is read from, see `manifest`."""

import contextlib
import math
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from ddpm_tf.data.manifest import file_entries
from ddpm_tf.data.tfrecords import TFRecordSource
from ddpm_tf.errors import DataNotFoundError, InputError, unknown_name

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")


class ArraySource:
    """Images in memory.

    Args:
        images: uint8 [N, H, W, C].
        labels: int [N], or None.
        files: what they were read from, [(name, bytes)].
    """

    def __init__(self, images, labels=None, *, files=()):
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
            raise InputError(f"Images must be uint8 [N, H, W, C], found {images.dtype} {list(images.shape)}.")
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
                raise InputError(
                    f"Labels must be integers, one for each of the {len(images)} images, found {labels.dtype} "
                    f"{list(labels.shape)}."
                )
        self.num_examples, self.image_shape, self.files = len(images), tuple(images.shape[1:]), files
        with tf.device("CPU"):
            self.tensors = {"image": tf.constant(images)}
            if labels is not None:
                self.tensors["label"] = tf.constant(labels, tf.int32)

    def read(self, indices):
        return {name: tf.gather(tensor, indices) for name, tensor in self.tensors.items()}


class FolderSource:
    """Image files under a folder, decoded when they are needed."""

    def __init__(self, paths, image_shape, root):
        self.num_examples, self.image_shape = len(paths), tuple(image_shape)
        self.paths, self.files = paths, file_entries(paths, root)

    def read(self, indices):
        return {"image": tf.numpy_function(self.decode, [indices], tf.uint8)}

    def decode(self, indices):
        """numpy int [B] -> uint8 [B, H, W, C]."""
        return np.stack([decode_image(self.paths[i], self.image_shape) for i in indices])


def decode_image(path, image_shape):
    """One image file as uint8 [H, W, C], turned upright, cut in the middle to the aspect, and shrunk.

    Raises:
        InputError: not an image, smaller than the target, animated, with an alpha channel, more than 8 bits
            per channel, or with other channels than asked for.
    """
    height, width, channels = image_shape
    with _opened(path) as image:
        _check_header(path, image, image_shape)
        image = ImageOps.exif_transpose(image)
        image = image.convert("L" if channels == 1 else "RGB")
    if (image.height, image.width) != (height, width):
        image = _cut_to_aspect(image, width / height).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8).reshape(image_shape)


def check_image(path, image_shape):
    """Raise what `decode_image` would raise, from the file's header alone."""
    with _opened(path) as image:
        _check_header(path, image, image_shape)


@contextlib.contextmanager
def _opened(path):
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except Exception as e:  # Pillow raises many kinds, OSError and SyntaxError among them
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise InputError(f"{path} ({size} bytes) cannot be read as an image: {e}. Repair or remove it.") from e


def _cut_to_aspect(image, aspect):
    """The largest middle part with width / height = aspect; cut first, so that no pixel outside is blended in."""
    width, height = min(image.width, round(image.height * aspect)), min(image.height, round(image.width / aspect))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _check_header(path, image, image_shape):
    height, width, channels = image_shape
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path} is animated ({image.n_frames} frames); expected one picture.")
    if image.has_transparency_data:
        raise InputError(f"{path} has an alpha channel; flatten it on a background first.")
    expected = {1: ("1", "L"), 3: ("RGB", "P", "CMYK", "YCbCr")}[channels]
    if image.mode not in expected:
        raise InputError(
            f"{path} has Pillow mode {image.mode}; with data.channels={channels} expected one of {expected}. "
            "Convert it, or set data.channels."
        )
    # EXIF orientation 5..8: stored on its side. Asking a PNG without EXIF for it would decode all of its pixels.
    turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) >= 5
    found = (image.width, image.height) if turned else (image.height, image.width)
    if found[0] < height or found[1] < width:
        raise InputError(
            f"{path} has {found[0]}x{found[1]} pixels, smaller than data.image_size {height}x{width}; images are never "
            "enlarged. Remove it or lower data.image_size."
        )


def load_digits(_, options):
    """scikit-learn's 1,797 handwritten digits, 8x8x1; the grey levels 0..16 become 16 x, at most 255."""
    from sklearn.datasets import load_digits as load

    data = load()
    return ArraySource(np.minimum(data.images * 16, 255).astype(np.uint8)[..., None], data.target)


def load_npz(path, options):
    """An .npz file with `images` uint8 [N, H, W, C] and perhaps `labels` int [N]."""
    if not os.path.isfile(path):
        raise DataNotFoundError(f"data.source names the file {path!r}, which does not exist. Write npz:PATH.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception as e:  # a file that is no zip, a pickle, a truncated member
        raise InputError(f"{path} cannot be read as an .npz file: {e}") from e
    if "images" not in found:
        raise InputError(f"{path} has the arrays {sorted(found)}; expected 'images' (uint8 [N, H, W, C]).")
    return ArraySource(found["images"], found.get("labels"), files=file_entries([path], os.path.dirname(path)))


def load_folder(path, options):
    """Every image file under a folder, in the byte order of the paths; hidden files are left out."""
    if not os.path.isdir(path):
        raise DataNotFoundError(f"data.source names the folder {path!r}, which does not exist. Write folder:PATH.")
    paths, others = [], []
    for root, folders, files in os.walk(path):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in files:
            if not name.startswith("."):
                (paths if name.lower().endswith(_SUFFIXES) else others).append(os.path.join(root, name))
    if others:
        raise InputError(
            f"{others[0]} is not an image by its name ({len(others)} such files, {len(paths)} images); "
            f"expected {' '.join(_SUFFIXES)}. Remove the other files or use another folder."
        )
    if not paths:
        raise InputError(f"The folder {path!r} holds no images; expected files ending in {' '.join(_SUFFIXES)}.")
    source = FolderSource(sorted(paths, key=os.fsencode), options.image_shape, path)
    if options.fits_in_memory(len(paths)):
        return ArraySource(source.decode(range(len(paths))), files=source.files)
    for path in source.paths:
        check_image(path, options.image_shape)  # headers only: a file that is no image shows before work begins
    return source


def load_tfds(name, options):
    """A TensorFlow Datasets image data set, by name (`tfds:cifar10`, `tfds:celeb_a_hq/256`)."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=options.data_dir or None)
    except (ValueError, AssertionError, KeyError) as e:  # no such data set, configuration or version
        what = str(e).partition("\n")[0]
        raise InputError(f"data.source names the TFDS data set {name!r}, which does not exist: {what}") from e
    if options.download and not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except Exception as e:  # no network, a changed checksum, a manual download that is missing
            raise InputError(f"The TFDS data set {name!r} cannot be downloaded and prepared: {e}") from e
    if not builder.is_prepared():
        where = f" --data_dir={options.data_dir}" if options.data_dir else ""
        raise DataNotFoundError(
            f"The TFDS data set {name!r} is not prepared in {builder.data_path}. Run\n"
            f"  tfds build {name}{where}\nor start again with --download (both need a network)."
        )
    if "image" not in builder.info.features:
        raise InputError(f"The TFDS data set {name!r} has no 'image' feature, only {list(builder.info.features)}.")
    keys = [k for k in ("image", "label") if k in builder.info.features]
    if options.split not in builder.info.splits:
        raise InputError(
            f"The TFDS data set {name!r} has no split {options.split!r}, only {list(builder.info.splits)}. "
            "Set data.split."
        )
    if options.fits_in_memory(builder.info.splits[options.split].num_examples):
        read_config = tfds.ReadConfig(interleave_cycle_length=1)  # the order of the files
        dataset = builder.as_dataset(split=options.split, shuffle_files=False, read_config=read_config)
        examples = list(dataset.map(lambda x: {k: x[k] for k in keys}).as_numpy_iterator())
        arrays = (np.stack([x[k] for x in examples]) for k in keys)
        return ArraySource(*arrays, files=[_tfds_entry(builder, options.split)])
    return _RandomAccessSource(builder, options.split, keys)


def _tfds_entry(builder, split):
    return f"{builder.info.full_name}/{split}", builder.info.splits[split].num_bytes


class _RandomAccessSource:
    """A TFDS data set too large for memory, read by index from a random-access file format."""

    def __init__(self, builder, split, keys):
        try:
            self._data = builder.as_data_source(split=split)
        except NotImplementedError as e:
            raise InputError(
                f"{builder.info.full_name} is larger than data.in_memory_mb and is prepared in a format without random "
                f"access. Prepare it again: tfds build {builder.name} --file_format=array_record, or raise "
                "data.in_memory_mb."
            ) from e
        self.num_examples, self.image_shape = len(self._data), builder.info.features["image"].shape
        self._keys, self.files = keys, [_tfds_entry(builder, split)]

    def read(self, indices):
        arrays = tf.numpy_function(self._read, [indices], [tf.uint8, tf.int32][: len(self._keys)])
        arrays = arrays if isinstance(arrays, list | tuple) else [arrays]
        shapes = [[None, *self.image_shape], [None]]
        return {k: tf.ensure_shape(a, s) for k, a, s in zip(self._keys, arrays, shapes, strict=False)}

    def _read(self, indices):
        examples = self._data.__getitems__(indices.tolist())
        dtypes = {"image": np.uint8, "label": np.int32}
        return [np.stack([x[k] for x in examples]).astype(dtypes[k]) for k in self._keys]


def load_tfrecord(path, options):
    """A TFRecord file as StyleGAN2 makes them, or every *.tfrecord(s) file of a folder, in the byte order of the names."""
    paths = [path]
    if os.path.isdir(path):
        names = sorted((n for n in os.listdir(path) if n.endswith((".tfrecord", ".tfrecords"))), key=os.fsencode)
        paths = [os.path.join(path, name) for name in names]
    if not paths or not os.path.isfile(paths[0]):
        raise DataNotFoundError(
            f"data.source names {path!r}, which is no TFRecord file and no folder of *.tfrecord or *.tfrecords files."
        )
    source = TFRecordSource(paths, options.image_shape, keep_offsets=not options.read_only)
    if options.fits_in_memory(source.num_examples):
        return ArraySource(source.decode(range(source.num_examples)), files=source.files)
    return source


SOURCES = {
    "digits": load_digits,
    "folder": load_folder,
    "npz": load_npz,
    "tfds": load_tfds,
    "tfrecord": load_tfrecord,
}


class Options(NamedTuple):
    """What a loader may need beside its argument; see `load_source`."""

    image_shape: tuple
    split: str
    data_dir: str
    download: bool
    in_memory_mb: int
    read_only: bool

    def fits_in_memory(self, num_examples):
        return num_examples * math.prod(self.image_shape) <= self.in_memory_mb * 2**20


def load_source(name, *, image_shape, split="train", data_dir="", download=False, in_memory_mb=4096, read_only=False):
    """A data source by name.

    Args:
        name: digits, folder:PATH, npz:PATH, tfds:NAME or tfrecord:PATH.
        image_shape: (H, W, C) that the network expects; a folder's images are cut and shrunk to it, any
            other source has to have it.
        split, data_dir, download: for tfds: which split, where it is prepared, and whether to fetch it.
        in_memory_mb: data up to this many MiB are decoded at the start and kept in memory.
        read_only: write nothing, not even the index of a TFRecord file.

    Raises:
        DataNotFoundError: data that are not there.
        InputError: unknown, empty or unreadable data, or images of another shape.
    """
    kind, _, argument = name.partition(":")
    if kind not in SOURCES:
        raise unknown_name("data source", name, SOURCES)
    options = Options(tuple(image_shape), split, data_dir, download, in_memory_mb, read_only)
    source = SOURCES[kind](argument, options)
    if tuple(source.image_shape) != tuple(image_shape):
        raise InputError(
            f"The images of data.source={name!r} have shape {list(source.image_shape)}, but data.image_size, "
            f"data.image_width and data.channels ask for {list(image_shape)}."
        )
    return source
