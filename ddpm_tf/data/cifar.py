"""CIFAR-10 and CIFAR-100 as their authors publish them: https://www.cs.toronto.edu/~kriz/cifar.html."""

import contextlib
import functools
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ddpm_tf import text
from ddpm_tf.data.arrays import ArraySource
from ddpm_tf.data.contract import Details, LoadOptions
from ddpm_tf.data.reading import open_regular
from ddpm_tf.errors import DataNotFoundError, InputError

_PIXELS = 3 * 32 * 32
_MAX_BYTES = 2**28  # of one file; the largest of the authors' has 155 MB


class _Kind(NamedTuple):
    """A data set.

    binary, python: {split: names of the files of that version}. names: the files that name the classes. label_bytes: before
    the pixels of a record, of which the last is the label. key: of the labels in the Python version. names_key: of the names.
    """

    binary: Mapping[str, tuple[str, ...]]
    python: Mapping[str, tuple[str, ...]]
    names: tuple[str, str]
    label_bytes: int
    key: str
    names_key: str


_KINDS = {
    10: _Kind(
        {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)},
        {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
        ("batches.meta.txt", "batches.meta"), 1, "labels", "label_names",
    ),
    100: _Kind(
        {"train": ("train.bin",), "test": ("test.bin",)}, {"train": ("train",), "test": ("test",)},
        ("fine_label_names.txt", "meta"), 2, "fine_labels", "fine_label_names",
    ),
}  # fmt: skip


def load_cifar10(path: str, options: LoadOptions) -> ArraySource:
    """CIFAR-10, see `_load`."""
    return _load(10, path, options)


def load_cifar100(path: str, options: LoadOptions) -> ArraySource:
    """CIFAR-100 with its fine labels, see `_load`."""
    return _load(100, path, options)


def _load(classes: int, path: str, options: LoadOptions) -> ArraySource:
    """The binary version or the Python version; no pickle is executed, see `_Unpickler`.

    Args:
        path: the authors' .tar.gz file, or a folder with what it holds.
    """
    kind = _KINDS[classes]
    if options.split not in kind.binary:
        raise InputError(f"cifar{classes}: has the splits {sorted(kind.binary)}, but data.split={options.split}.")
    with _opened(path, f"cifar{classes}:PATH") as files:
        for version, parse in ((kind.binary, _parse_binary), (kind.python, _parse_python)):
            wanted = version[options.split]
            missing = [name for name in wanted if name not in files]
            if missing == list(wanted):
                continue
            if missing:
                raise InputError(f"{text.printable(path)} lacks {', '.join(missing)} of the split {options.split}.")
            contents = [_read(files, name, path) for name in wanted]
            parts = [
                _attempt(functools.partial(parse, content, kind), name, path)
                for name, content in zip(wanted, contents, strict=True)
            ]
            pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            if labels.max(initial=0) >= classes:
                raise InputError(f"{text.printable(path)} has the label {labels.max()}; expected 0..{classes - 1}.")
            images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            entries = [(name, len(content)) for name, content in zip(wanted, contents, strict=True)]
            return ArraySource(images, labels, files=entries, details=Details(_class_names(files, kind, path)))
    raise DataNotFoundError(
        f"{text.printable(path)} holds no CIFAR-{classes}; expected {kind.binary[options.split][0]} (binary version) or "
        f"{kind.python[options.split][0]} (Python version) in it."
    )


_Files = Mapping[str, Callable[[], bytes]]


@contextlib.contextmanager
def _opened(path: str, expected: str) -> Iterator[_Files]:
    """{file name: reads it} of a folder or tar file, in any subfolder of it; nothing is unpacked."""
    if os.path.isdir(path):
        found: dict[str, Callable[[], bytes]] = {}
        for folder, _, names in os.walk(path):
            for name in names:
                found.setdefault(name, functools.partial(_read_file, os.path.join(folder, name)))
        yield found
        return
    with open_regular(path, expected) as file:
        try:
            with tarfile.open(fileobj=file) as tar:
                yield {
                    os.path.basename(m.name): functools.partial(_read_tar, tar, m) for m in _members(tar) if m.isreg()
                }
        except InputError:
            raise
        except Exception as e:  # no tar file, a damaged gzip stream
            raise InputError(f"{text.printable(path)} cannot be read as a tar file: {text.printable(str(e))}") from e


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.offset_data + member.size > 4 * _MAX_BYTES:
            raise ValueError(f"it unpacks to more than {4 * _MAX_BYTES:,} bytes, which is not CIFAR")
        yield member


def _read_file(path: str) -> bytes:
    with open_regular(path, "a file of CIFAR") as file:
        return file.read(_MAX_BYTES + 1)


def _read_tar(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content is not None  # it is a regular file
    return content.read(_MAX_BYTES + 1)


def _read(files: _Files, name: str, path: str) -> bytes:
    content = files[name]()
    if len(content) > _MAX_BYTES:
        raise InputError(f"{text.printable(path)}: {name} has more than {_MAX_BYTES:,} bytes: it is no file of CIFAR.")
    return content


def _attempt(parse: Callable[[], Any], name: str, path: str) -> Any:
    """The result of `parse`; whatever it raises says that the file is damaged."""
    try:
        return parse()
    except Exception as e:  # pickle raises many kinds
        raise InputError(
            f"{text.printable(path)}: {name} is damaged: {text.printable(str(e))}. Download it again."
        ) from e


def _parse_binary(content: bytes, kind: _Kind) -> tuple[np.ndarray, np.ndarray]:
    size = kind.label_bytes + _PIXELS
    if not content or len(content) % size:
        raise ValueError(f"{len(content):,} bytes are no multiple of {size:,}, the bytes of an image")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, kind.label_bytes :], records[:, kind.label_bytes - 1].astype(np.int64)


def _parse_python(content: bytes, kind: _Kind) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickled(content)
    data = batch["data"].array() if isinstance(batch["data"], _Array) else None
    labels = batch[kind.key]
    if data is None or data.ndim != 2 or data.shape[1] != _PIXELS or not isinstance(labels, list):
        raise ValueError(f"expected 'data', uint8 [N, {_PIXELS}], and the list '{kind.key}'")
    if len(labels) != len(data) or any(type(label) is not int or not 0 <= label < 256 for label in labels):
        raise ValueError(f"expected {len(data)} labels, integers of at least 0")
    return data, np.array(labels, np.int64)


def _class_names(files: _Files, kind: _Kind, path: str) -> list[str]:
    """The names of the classes, if they are beside the images."""
    plain, pickled = kind.names
    if plain in files:
        return _read(files, plain, path).decode("ascii", "replace").split()
    if pickled in files:
        names = _attempt(lambda: _unpickled(_read(files, pickled, path))[kind.names_key], pickled, path)
        return [name.decode("ascii", "replace") if isinstance(name, bytes) else str(name) for name in names]
    return []


def _unpickled(content: bytes) -> dict[str, Any]:
    """A pickled dictionary with its keys as text."""
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(batch, dict):
        raise ValueError("it is not a dictionary")
    return {
        key.decode("ascii", "replace") if isinstance(key, bytes) else str(key): value for key, value in batch.items()
    }


class _Array:
    """Stands for a numpy array while a pickle is read; holds its state and runs nothing."""

    def __init__(self, *args: object) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array, uint8."""
        _, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, _Type) or dtype.name not in (b"u1", "u1") or is_fortran or not isinstance(data, bytes):
            raise ValueError("expected an array of bytes")
        return np.frombuffer(data, np.uint8).reshape(shape)


class _Type:
    """Stands for a numpy type."""

    def __init__(self, name: object = "", *args: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which bytes do not have."""


def _latin1(value: str, encoding: str) -> bytes:
    return value.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads a pickle of plain values and arrays. It imports nothing and calls nothing but the stand-ins above."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return {"ndarray": _Array, "dtype": _Type}[name]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which pictures do not need; it may be an attack")
