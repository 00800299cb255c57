"""What a data set consists of: so that a run notices when it is started again with another data set."""

import hashlib
import itertools
from typing import TypedDict

from ddpm_tf.data.arrays import ArraySource
from ddpm_tf.data.contract import Source


class Manifest(TypedDict):
    """What identifies a source's examples and their order; plain JSON.

    num_examples: how many there are.
    files: [name, bytes] of each file, in the order in which the examples are numbered.
    sha256: {"image": digest, ("label": digest)} of data that are held in memory, else {}.
    """

    num_examples: int
    files: list[list]
    sha256: dict[str, str]


def manifest(source: Source) -> Manifest:
    """The manifest of a source. Reads data that are held in memory, and no file."""
    tensors = source.tensors if isinstance(source, ArraySource) else {}
    return {
        "num_examples": source.num_examples,
        "files": [list(entry) for entry in source.files],
        "sha256": {
            name: hashlib.sha256(memoryview(tensor.numpy()).cast("B")).hexdigest() for name, tensor in tensors.items()
        },
    }


def digest(data: Manifest) -> str:
    """One SHA-256 for a manifest; it does not depend on whether the data are held in memory."""
    text = repr((data["num_examples"], data["files"] or data["sha256"]))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def difference(old: Manifest, new: Manifest) -> str | None:
    """How two manifests differ, as a phrase that begins with both counts. None: they do not."""
    counts = f"{old['num_examples']:,} images then, {new['num_examples']:,} now"
    for k, (a, b) in enumerate(itertools.zip_longest(old["files"], new["files"])):
        if a != b:
            then, now = (f"{e[0]!r} ({e[1]:,} bytes)" if e else "nothing" for e in (a, b))
            return f"{counts}; file {k} was {then} and is {now}"
    changed = [name for name, value in old["sha256"].items() if new["sha256"].get(name, value) != value]
    if changed:
        return f"{counts}; the contents of {' and '.join(changed)} changed"
    return counts if old["num_examples"] != new["num_examples"] else None
