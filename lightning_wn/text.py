"""How numbers, names and tables are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def text_table(columns: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the lines of a table, the names of the columns first, all set to the right.

    Args:
        columns: Name and cells of each; equally many cells.
    """
    table = [[name, *cells] for name, cells in columns]
    widths = [max(map(len, column)) for column in table]
    lines = zip(*table, strict=True)
    return ["  " + "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]


def format_count(value: float) -> str:
    """Format a number of examples for people: three significant digits, no exponent below a million."""
    if not math.isfinite(value) or value == 0.0:
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.3g}" if abs(value) >= 1e6 or digits else f"{float(f'{value:.3g}'):,.0f}"


def some(names: Iterable[object]) -> str:
    """Write out the first names of a list, for messages."""
    words = [str(name) for name in names]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def plural(count: int, noun: str) -> str:
    """Write out how many of something there are."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
