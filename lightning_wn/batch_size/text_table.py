"""Columns of text beside each other."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(columns: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the lines of a table, the names of the columns first, all set to the right.

    Args:
        columns: Name and cells of each; equally many cells.

    Example:
        >>> text_table([("size", ["8", "16"]), ("steps", ["1,280", "640"])])
        ['  size  steps', '     8  1,280', '    16    640']
    """
    table = [[name, *cells] for name, cells in columns]
    widths = [max(map(len, column)) for column in table]
    lines = zip(*table, strict=True)
    return ["  " + "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
