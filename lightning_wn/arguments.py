"""What a number that a user gives may be: one answer for every argument of its kind."""

from __future__ import annotations

import math
from numbers import Integral, Real


def is_whole(value: object, least: int = 1) -> bool:
    """Whether an argument is a whole number of at least ``least``; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_between(value: object, low: float, high: float = math.inf) -> bool:
    """Whether an argument is a number strictly between two; NaN, True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and low < float(value) < high


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless the level of an interval lies strictly between 0 and 1."""
    if not is_between(confidence, 0.0, 1.0):
        raise ValueError(f"`confidence` must lie between 0 and 1, exclusive, got {confidence!r}; 0.95 is usual.")
