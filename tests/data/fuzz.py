"""Damaged data of all kinds, seeded: every outcome is a data set or an InputError, soon and within bounded memory.

  python -m tests.data.fuzz                   the full size, an hour on 2 cores: 100,000 pictures of six formats, 20,000 npz,
                                              20,000 TFRecord files and indexes, 10,000 idx and CIFAR files
  python -m tests.data.fuzz --scale=0.01      a hundredth of it; the slow tests run this

Every case is tried in this process. A case that takes above 5 s, raises anything but InputError, or a growth of memory above
1 GB fails. The number of a case and its kind make it again: --kind=png --first=1234 --count=1.
"""

import argparse
import contextlib
import gzip
import io
import os
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddpm_tf.data.picture import PictureError, PictureOptions, decode, examine
from ddpm_tf.data.sources import load_source
from ddpm_tf.data.tfrecords import load_offsets
from ddpm_tf.errors import InputError
from tests.data import zoo
from tests.data.test_cifar import write_cifar
from tests.data.test_idx import write_idx
from tests.data.test_tfrecords import example
from tests.data.test_tfrecords import write as write_records

SECONDS, GROWTH = 5.0, 2**30
OPTIONS = (
    PictureOptions((16, 16, 3)),
    PictureOptions((16, 16, 1), small="enlarge", animated="first", background="black"),
)


def damaged(content: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """One to four damages: bytes, bits, cuts, repeats, insertions, large lengths, parts of another file."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        # Half of the damages hit the beginning, where the lengths and types stand.
        at = int(rng.integers(0, min(len(data), 64) if rng.random() < 0.5 else len(data)))
        size = int(rng.integers(1, 17))
        match rng.integers(0, 8):
            case 0:
                data[at] = int(rng.integers(0, 256))
            case 1:
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + 8 * size]
            case 5:
                data[at:at] = rng.bytes(size)
            case 6:
                data[at : at + 4] = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\xff\xff"][
                    rng.integers(0, 4)
                ]
            case 7:
                data[at : at + size] = other[at : at + size]
    return bytes(data)


class Case:
    """A kind of case: `seeds` are whole files; `attempt` takes a folder and one damaged file."""

    def __init__(self, seeds: list[bytes], attempt: Callable[[Path, bytes], None], full: int) -> None:
        self.seeds, self.attempt, self.full = seeds, attempt, full


def _picture(suffix: str) -> Callable[[Path, bytes], None]:
    def attempt(folder: Path, content: bytes) -> None:
        path = folder / f"x.{suffix}"
        path.write_bytes(content)
        for options in OPTIONS:
            for look in (examine, decode):
                with contextlib.suppress(PictureError):
                    look(str(path), options)

    return attempt


def _pictures() -> dict[str, Case]:
    ends = {kind: (f".{kind}",) for kind in ("png", "webp", "bmp", "gif")}
    ends |= {"jpg": (".jpg", ".jpeg"), "tif": (".tif", ".tiff")}
    everything = [
        (str(name), content) for name, (content, _) in (zoo.GOOD | zoo.BAD).items() if 100 < len(content) < 20_000
    ]
    return {
        kind: Case([c for name, c in everything if name.endswith(suffixes)], _picture(kind), 100_000 // len(ends))
        for kind, suffixes in ends.items()
    }


def _npz() -> Case:
    images = np.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3).astype(np.uint8)
    seeds = []
    for save in (np.savez, np.savez_compressed):
        for arrays in ({"images": images, "labels": np.array([1, 2])}, {"images": images / 255}, {"arr_0": images}):
            buffer = io.BytesIO()
            save(buffer, **arrays)
            seeds.append(buffer.getvalue())

    def attempt(folder: Path, content: bytes) -> None:
        (folder / "x.npz").write_bytes(content)
        for settings in ({}, {"range": "0..1", "layout": "channels_first"}):
            with contextlib.suppress(InputError):
                load_source(f"npz:{folder}/x.npz", image_shape=(8, 8, 3), **settings)
        # Damage behind the checksum of the zip file: the array itself.
        with zipfile.ZipFile(folder / "y.npz", "w") as archive:
            archive.writestr("images.npy", content[30:])
        with contextlib.suppress(InputError):
            load_source(f"npz:{folder}/y.npz", image_shape=(8, 8, 3))

    npy = io.BytesIO()
    np.save(npy, images)
    return Case([*seeds, bytes(30) + npy.getvalue()], attempt, 20_000)


def _tfrecord(folder: Path) -> Case:
    path = folder / "seed.tfrecords"
    images = [np.full((4, 6, 3), k, np.uint8) for k in range(5)]
    write_records(path, [example(image) for image in images])

    def attempt(folder: Path, content: bytes) -> None:
        (folder / "x.tfrecords").write_bytes(content)
        for keep in (True, False):  # the second time by the index of the first
            with contextlib.suppress(InputError):
                load_source(f"tfrecord:{folder}/x.tfrecords", image_shape=(4, 6, 3), read_only=not keep)
        (folder / "x.tfrecords.offsets.npz").unlink(missing_ok=True)

    return Case([path.read_bytes()], attempt, 10_000)


def _index(folder: Path) -> Case:
    path = folder / "whole.tfrecords"
    write_records(path, [example(np.full((4, 6, 3), k, np.uint8)) for k in range(5)])
    right = load_offsets(str(path))
    index = folder / "whole.tfrecords.offsets.npz"
    kept = index.read_bytes()
    with np.load(index) as arrays:
        values = dict(arrays)

    def attempt(folder: Path, content: bytes) -> None:
        index.write_bytes(content)
        assert (load_offsets(str(path)) == right).all()
        rng = np.random.Generator(np.random.PCG64(sum(content)))
        offsets = values["offsets"].copy()
        offsets[rng.integers(0, len(offsets))] = rng.integers(0, 2**63, dtype=np.uint64)
        np.savez(index, **values | {"offsets": offsets[: rng.integers(0, 6)]})
        assert (load_offsets(str(path)) == right).all()

    return Case([kept], attempt, 10_000)


def _idx(folder: Path) -> Case:
    array = np.arange(5 * 6 * 4).reshape(5, 6, 4).astype(np.uint8)
    write_idx(folder / "seed", array)
    plain = (folder / "seed").read_bytes()

    def attempt(folder: Path, content: bytes) -> None:
        (folder / "x-images-idx3-ubyte").write_bytes(content)
        with contextlib.suppress(InputError):
            load_source(f"idx:{folder}/x-images-idx3-ubyte", image_shape=(6, 4, 1))

    return Case([plain, gzip.compress(plain)], attempt, 5_000)


def _cifar(folder: Path) -> Case:
    seeds = []
    for version, name in (("binary", "test_batch.bin"), ("python", "test_batch")):
        write_cifar(folder, 10, {"test": 2}, version=version)
        seeds.append((folder / name).read_bytes())

    def attempt(folder: Path, content: bytes) -> None:
        for name in ("test_batch.bin", "test_batch"):
            (folder / "c").mkdir(exist_ok=True)
            (folder / "c" / name).write_bytes(content)
            with contextlib.suppress(InputError):
                load_source(f"cifar10:{folder}/c", image_shape=(32, 32, 3), split="test")
            (folder / "c" / name).unlink()

    return Case(seeds, attempt, 5_000)


def memory() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(kind: str, case: Case, folder: Path, *, first: int, count: int) -> list[str]:
    """Try `count` cases; returns a line for each that failed."""
    failed = []
    begun = memory()
    for number in range(first, first + count):
        rng = np.random.Generator(np.random.PCG64([number, len(kind), *kind.encode()]))
        content = damaged(case.seeds[number % len(case.seeds)], rng, case.seeds[rng.integers(len(case.seeds))])
        began = time.monotonic()
        try:
            case.attempt(folder, content)
        except Exception as e:
            failed.append(f"--kind={kind} --first={number} --count=1: {type(e).__name__}: {e}")
        if time.monotonic() - began > SECONDS:
            failed.append(f"--kind={kind} --first={number} --count=1: {time.monotonic() - began:.1f} s")
    if memory() - begun > GROWTH:
        failed.append(f"--kind={kind}: memory grew by {(memory() - begun) / 2**20:,.0f} MiB")
    return failed


def cases(folder: Path) -> dict[str, Case]:
    """All kinds, by name."""
    return {**_pictures(), "npz": _npz(), "tfrecord": _tfrecord(folder), "index": _index(folder), "idx": _idx(folder),
            "cifar": _cifar(folder)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--kind", default="")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=0)
    args = parser.parse_args()
    failed = []
    warnings.simplefilter("ignore")  # Pillow's, of odd metadata
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, case in cases(folder).items():
            if args.kind in ("", kind):
                count = args.count or max(1, round(case.full * args.scale))
                began = time.monotonic()
                failed += (lines := run(kind, case, folder, first=args.first, count=count))
                print(f"{kind}: {count:,} cases, {len(lines)} failed, {time.monotonic() - began:.0f} s", flush=True)
    print(f"most memory: {memory() / 2**20:,.0f} MiB\n" + "\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    sys.exit(main())
