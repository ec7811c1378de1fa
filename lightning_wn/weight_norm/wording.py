"""How error messages list names."""

from __future__ import annotations

from collections.abc import Iterable


def some(names: Iterable[object]) -> str:
    """Write out the first names of a list, for messages.

    Example:
        >>> some(["a", "b", "c", "d", "e", "f"])
        'a, b, c, d and 2 more'
    """
    words = [str(name) for name in names]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
