"""The best of learning rates on a geometric grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_AROUND = (1, -1, -2, 2, -3, -4)
_FARTHEST = 8
"""Steps from where tuning began: 256 times the learning rate, at a ratio of 2."""


@dataclass(frozen=True)
class Tuned(Generic[T]):
    """The best grid point.

    Attributes:
        exponent: Its exponent.
        outcome: What came of it.
        at_edge: Whether it lies at the edge of what was tried.
    """

    exponent: int
    outcome: T
    at_edge: bool


def tune(attempt: Callable[[int, float], tuple[float, T]], start: int, *, fixed: bool = False) -> Tuned[T]:
    """Walk from ``start`` on until the best lies between two worse ones.

    Args:
        attempt: From an exponent, and the least cost so far, to a cost and an outcome. A cost that is infinite was
            worse than the least so far, or no good at all.
        start: Where to begin.
        fixed: Only try ``start``.
    """
    tried: dict[int, tuple[float, T]] = {start: attempt(start, math.inf)}

    def best() -> int:
        return min(tried, key=lambda exponent: (tried[exponent][0], abs(exponent - start)))

    def look(exponent: int) -> None:
        tried[exponent] = attempt(exponent, tried[best()][0])

    if fixed:
        return Tuned(start, tried[start][1], at_edge=False)
    while True:
        center = best()
        nothing = math.isinf(tried[center][0])  # where nothing was any good yet, look around
        around = [start + away for away in _AROUND] if nothing else [center + 1, center - 1]
        untried = [e for e in around if e not in tried and abs(e - start) <= _FARTHEST]
        if not untried:
            break
        look(untried[0])
    at_edge = nothing or center + 1 not in tried or center - 1 not in tried
    return Tuned(center, tried[center][1], at_edge)
