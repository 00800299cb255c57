"""What a data set consists of: so that a run notices when it is started again with another data set."""

import hashlib
import itertools
from typing import TypedDict

from ddpm_tf.data.arrays import ArraySource
from ddpm_tf.data.contract import Source


class Manifest(TypedDict, total=False):
    """What identifies a source's examples and their order; plain JSON.

    num_examples: how many there are.
    files: [name, bytes] of each file, in the order in which the examples are numbered.
    sha256: {"image": digest, ("label": digest)} of data that are held in memory, else {}.
    class_names, notes, left_out: see `contract.Details`; they identify nothing. Older files do not have them.
    """

    num_examples: int
    files: list[list]
    sha256: dict[str, str]
    class_names: list[str]
    notes: dict[str, int]
    left_out: list[list[str]]


def manifest(source: Source) -> Manifest:
    """The manifest of a source. Reads data that are held in memory, and no file."""
    tensors = source.tensors if isinstance(source, ArraySource) else {}
    return {
        "num_examples": source.num_examples,
        "files": [list(entry) for entry in source.files],
        "sha256": {
            name: hashlib.sha256(memoryview(tensor.numpy()).cast("B")).hexdigest() for name, tensor in tensors.items()
        },
        "class_names": list(source.details.class_names),
        "notes": dict(source.details.notes),
        "left_out": [list(entry) for entry in source.details.left_out],
    }


def digest(data: Manifest) -> str:
    """One SHA-256 for a manifest; it does not depend on whether the data are held in memory."""
    text = repr((data["num_examples"], data["files"] or data["sha256"]))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def difference(old: Manifest, new: Manifest) -> str | None:
    """How two manifests differ, as a phrase that begins with both counts. None: they do not.

    Where both hold the digests of the pixels, these decide, and names of files do not count.
    """
    counts = f"{old['num_examples']:,} images then, {new['num_examples']:,} now"
    same = [name for name, value in old["sha256"].items() if new["sha256"].get(name, value) == value]
    is_same = old["num_examples"] == new["num_examples"] and len(same) == len(old["sha256"])
    if is_same and "image" in same and "image" in new["sha256"]:
        return None
    for k, (a, b) in enumerate(itertools.zip_longest(old["files"], new["files"])):
        if a != b:
            then, now = (f"{e[0]!r} ({e[1]:,} bytes)" if e else "nothing" for e in (a, b))
            return f"{counts}; file {k} was {then} and is {now}"
    changed = [name for name, value in old["sha256"].items() if new["sha256"].get(name, value) != value]
    if changed:
        return f"{counts}; the contents of {' and '.join(changed)} changed"
    return counts if old["num_examples"] != new["num_examples"] else None
