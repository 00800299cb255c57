"""What is wrong with the files of a data set: one list of all of it, by kind."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ddpm_tf import text
from ddpm_tf.errors import InputError

_EXAMPLES = 3

# {kind of problem: (how it is said, what to do)}.
KINDS = {
    "folder": (
        "a folder that cannot be read: its pictures would be missing",
        "change its permissions, or move it away",
    ),
    "dangling": ("a link to a file that does not exist", "repair or remove the link"),
    "unreadable": ("no permission to read it", "change its permissions, or remove it"),
    "irregular": ("not a regular file", "remove it"),
    "name": ("not a picture by its name", "remove it, or use a folder of pictures alone"),
    "format": ("not a picture that is read here", "convert it to PNG or JPEG, or remove it"),
    "damaged": ("damaged", "repair or remove it"),
    "mode": ("colours that cannot be read", "convert it to 8-bit RGB or grey, or ask for other data.channels"),
    "transparent": ("an alpha channel", "flatten it, or set data.convert=auto, which puts it on data.background"),
    "animated": ("several pictures in one file", "take one out, or set data.animated=first"),
    "small": ("smaller than the images of the network", "remove it, or set data.small=enlarge or data.small=skip"),
    "large": ("too many pixels", "shrink it"),
    "label": ("its label is not known", "see data.labels"),
}


class Problem(NamedTuple):
    """One thing that is wrong with one file.

    kind: a key of KINDS. detail: what was found, such as "4x9 pixels", or "".
    """

    path: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        """On one line, whatever the name of the file contains."""
        said, remedy = KINDS[self.kind]
        detail = f" ({text.printable(self.detail)})" if self.detail else ""
        return f"{text.printable(self.path)}: {said}{detail}. What to do: {remedy}."


def table(problems: Sequence[Problem]) -> str:
    """All problems by kind: how many, what to do, and the first files of each."""
    lines = []
    for kind, (said, remedy) in KINDS.items():
        found = [p for p in problems if p.kind == kind]
        if found:
            lines.append(f"{len(found):,} x {said}: {remedy}")
            for p in found[:_EXAMPLES]:
                lines.append(f"    {text.printable(p.path)}{f' ({text.printable(p.detail)})' if p.detail else ''}")
            if len(found) > _EXAMPLES:
                lines.append(f"    and {len(found) - _EXAMPLES:,} more")
    return "\n".join(f"  {line}" for line in lines)


def settle(problems: Sequence[Problem], *, bad: str, limit: float, total: int) -> None:
    """Refuse bad files, unless they may be left out and are few.

    Args:
        problems: of files that cannot be used.
        bad: error, or skip.
        limit: with skip, the largest share of the files that may be left out. A folder that cannot be read never is.
        total: how many files there are, bad ones included.

    Raises:
        InputError: with all problems in one list.
    """
    if not problems:
        return
    listed = f"{len(problems):,} of {total:,} files cannot be used:\n{table(problems)}"
    if bad != "skip" or any(p.kind == "folder" for p in problems):
        raise InputError(f"{listed}\nOr leave bad files out by data.bad=skip.")
    if len(problems) > math.ceil(limit * total):
        raise InputError(
            f"{listed}\nThey are {len(problems) / total:.1%} of the files; data.bad=skip leaves out at most data.bad_limit="
            f"{limit:g} of them. Mend the files, or raise the limit."
        )
