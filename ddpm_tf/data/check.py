"""Looks at a data set before any training; changes nothing unless --write_index asks for an index.

  python -m ddpm_tf.data.check folder:PATH --image_size=64
  python -m ddpm_tf.data.check folder:PATH --image_size=64 --write_index     then: fast starts, and --verify
  python -m ddpm_tf.data.check folder:PATH --verify                          which files have changed since

The exit code is 0 if the data set can be trained on, else 2.
"""

import argparse
import collections
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging

from ddpm_tf import files, text
from ddpm_tf.choices import choose
from ddpm_tf.data import index as index_lib
from ddpm_tf.data.folder import Taken, check_settings, take_all
from ddpm_tf.data.labels import read_labels
from ddpm_tf.data.listing import Listing, list_images
from ddpm_tf.data.picture import PictureOptions, decode, examine
from ddpm_tf.data.problems import settle, table
from ddpm_tf.data.sources import SOURCES, load_source
from ddpm_tf.errors import InputError, RunError, StorageError, storage_advice


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    try:
        print(_verify(args) if args.verify else _check(args))
    except RunError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except OSError as e:
        print(f"error: {e}. {storage_advice(e)}", file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        print("Interrupted; nothing was changed.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_tf.data.check", description="Look at a data set; nothing is changed."
    )
    parser.add_argument("source", help="as data.source: folder:PATH, npz:PATH, idx:PATH, tfds:NAME, ...")
    parser.add_argument("--image_size", type=int, default=64, help="height of the images, pixels (64)")
    parser.add_argument("--image_width", type=int, default=0, help="width of the images; 0: as the height")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--split", default="train")
    parser.add_argument("--data_dir", default="")
    parser.add_argument(
        "--write_index", action="store_true", help="write PATH/.ddpm_tf_index.jsonl if all pictures pass"
    )
    parser.add_argument("--verify", action="store_true", help="compare a folder's bytes with its index")
    for name, default in _settings().items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"as data.{name} ({default})")
    return parser


def _settings() -> dict[str, Any]:
    """{setting: default} of all sources."""
    return {name: value for choice in SOURCES.values() for name, value in choice.defaults().items()}


def _check(args: argparse.Namespace) -> str:
    """The report on a data set. A folder's pictures are all decoded, and its problems listed."""
    kind, _, path = args.source.partition(":")
    shape = (args.image_size, args.image_width or args.image_size, args.channels)
    if min(shape) < 1:
        raise InputError(f"--image_size and --image_width must be at least 1, but the images would be {list(shape)}.")
    if args.write_index and kind != "folder":
        raise InputError(f"--write_index is for folder:PATH, but the source is {args.source!r}.")
    defaults = _settings()
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) != defaults[name]}
    if kind == "folder":
        choose("data source", kind, SOURCES, given)
        return _check_folder(path, shape, {**SOURCES[kind].defaults(), **given}, write_index=args.write_index)
    options = {"image_shape": shape, "split": args.split, "data_dir": args.data_dir}
    source = load_source(args.source, **options, read_only=True, **given)
    names = f", classes {', '.join(source.details.class_names)}" if source.details.class_names else ""
    return f"{source.num_examples:,} images of {list(source.image_shape)}{names}"


def _check_folder(path: str, shape: tuple[int, int, int], settings: dict[str, Any], *, write_index: bool) -> str:
    check_settings(settings)
    listing = list_images(path)
    how = PictureOptions(shape, *(settings[name] for name in ("convert", "background", "small", "animated")))
    labels, classes = read_labels(settings["labels"], path, [entry.name for entry in listing.entries])
    rows: dict[int, index_lib.Row] = {}

    def take(k: int) -> list[str]:
        entry, file = listing.entries[k], os.path.join(path, listing.entries[k].name)
        header, (_, notes) = examine(file, how), decode(file, how)
        rows[k] = index_lib.Row(
            **entry._asdict(), sha256=files.sha256(file), **header._asdict(), options=index_lib.key(how)
        )
        return notes

    taken = take_all(take, len(listing.entries), "checking")
    problems = listing.problems + taken.problems
    print(_report(path, listing, taken, list(rows.values())))
    if labels is not None:
        counts = collections.Counter(labels[taken.kept].tolist())
        print(
            text.table(
                [("pictures", "class")] + [(f"{counts[k]:,}", name) for k, name in enumerate(classes)], right=[0]
            )
        )
    settle(
        problems, bad=settings["bad"], limit=settings["bad_limit"], total=len(listing.entries) + len(listing.problems)
    )
    if not taken.kept.any():
        raise InputError(f"The folder {path!r} holds no picture that can be used:\n{table(taken.skipped)}")
    if write_index:
        written = index_lib.write_index(path, (rows[k] for k in sorted(rows)))
        return f"{taken.kept.sum():,} pictures can be used. Their index is {written}."
    return f"{taken.kept.sum():,} pictures can be used."


def _report(path: str, listing: Listing, taken: Taken, rows: Sequence[index_lib.Row]) -> str:
    """Counts of formats, colours, sizes, conversions and what is left out."""
    lines = [f"{len(listing.entries):,} picture files in {text.printable(path)}", *listing.notes]
    if rows:
        formats = collections.Counter(f"{row.format}, Pillow mode {row.mode}" for row in rows)
        areas = sorted((row.height * row.width, row.height, row.width) for row in rows)
        sizes = " ".join(f"{height}x{width}" for _, height, width in (areas[0], areas[len(areas) // 2], areas[-1]))
        lines += [f"smallest, middle and largest: {sizes} pixels"]
        lines += [text.table([(f"{n:,}", what) for what, n in (formats + taken.notes).most_common()], right=[0])]
    if taken.skipped:
        lines += [f"Left out by the settings:\n{table(taken.skipped)}"]
    return "\n".join(lines)


def _verify(args: argparse.Namespace) -> str:
    """Compare the bytes of a folder's files with its index."""
    kind, _, path = args.source.partition(":")
    if kind != "folder":
        raise InputError(f"--verify is for folder:PATH, but the source is {args.source!r}.")
    listing, rows = list_images(path), {row.name: row for row in index_lib.read_rows(path)}
    if not rows:
        raise InputError(f"{text.printable(path)} has no index {index_lib.NAME}; write one by --write_index.")
    entries = {entry.name: entry for entry in listing.entries}

    def take(k: int) -> list[str]:
        name = names[k]
        file = os.path.join(path, name)
        try:
            return [] if files.sha256(file) == rows[name].sha256 else [f"changed: {text.printable(name)}"]
        except OSError as e:
            return [f"cannot be read ({e.strerror}): {text.printable(name)}"]

    names = sorted(rows.keys() & entries.keys())
    found = sorted(take_all(take, len(names), "verifying").notes)
    found += [f"gone: {text.printable(name)}" for name in sorted(rows.keys() - entries.keys())]
    found += [f"new: {text.printable(name)}" for name in sorted(entries.keys() - rows.keys())]
    if found:
        raise InputError(f"{len(found):,} files differ from the index:\n  " + "\n  ".join(found))
    return f"{len(names):,} files have the bytes that the index says."


if __name__ == "__main__":
    sys.exit(main())
