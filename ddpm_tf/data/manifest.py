"""What a data set consists of, so that a run notices when it is to go on with another one."""

import hashlib
import itertools
import os


def manifest(source):
    """What identifies a source's examples and their order, as JSON can hold it.

    Returns:
        {"num_examples": int, "files": [[name, bytes], ...] in the order the examples are numbered,
        "sha256": {"image": digest, ...} of data that are held in memory, else {}}.
    """
    tensors = getattr(source, "tensors", {})
    return {
        "num_examples": source.num_examples,
        "files": [list(entry) for entry in source.files],
        "sha256": {
            name: hashlib.sha256(memoryview(tensor.numpy()).cast("B")).hexdigest() for name, tensor in tensors.items()
        },
    }


def digest(found):
    """One SHA-256 for a manifest; it does not depend on whether the data are held in memory."""
    text = repr((found["num_examples"], found["files"] or found["sha256"]))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def difference(old, new):
    """How two manifests differ, as a phrase that begins with the counts, or None where they do not."""
    counts = f"{old['num_examples']:,} images then, {new['num_examples']:,} now"
    for k, (a, b) in enumerate(itertools.zip_longest(old["files"], new["files"])):
        if a != b:
            then, now = (f"{e[0]!r} ({e[1]:,} bytes)" if e else "nothing" for e in (a, b))
            return f"{counts}; file {k} was {then} and is {now}"
    changed = [name for name, value in old["sha256"].items() if new["sha256"].get(name, value) != value]
    if changed:
        return f"{counts}; the contents of {' and '.join(changed)} changed"
    return counts if old["num_examples"] != new["num_examples"] else None


def file_entries(paths, root):
    """[(name relative to root, bytes)] of files, in the order given."""
    return [(os.path.relpath(path, root), os.path.getsize(path)) for path in paths]
