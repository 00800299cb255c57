"""Text for people: tables with aligned columns."""

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[object]], *, header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Rows of cells as lines, with two spaces between the columns.

    Args:
        rows: equally long sequences; every cell is shown by `str`.
        header: a first row; (): none.
        right: the columns that are aligned to the right.
    """
    cells = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    if not cells:
        return ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if k in right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """A file name or message for one line of a message: as it is, or quoted with escapes if it has unprintable characters."""
    return text if text.isprintable() else ascii(text)
