"""A fixed schedule of accumulation factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from lightning_wn.arguments import is_whole

ScheduleUnit = Literal["step", "epoch", "examples", "tokens"]


class AccumulationSchedule:
    """``accumulate_grad_batches`` by how far training has come.

    Args:
        factors: From a position to the factor that holds from there on.
        unit: What positions count: optimizer steps, epochs, or examples or tokens over all ranks.

    Raises:
        ValueError: If a position or factor is not a whole number in range, or there is none.
    """

    def __init__(self, factors: Mapping[int, int], unit: ScheduleUnit) -> None:
        if unit not in get_args(ScheduleUnit):
            raise ValueError(f"`schedule_by` must be one of {list(get_args(ScheduleUnit))}, got {unit!r}.")
        wrong = [pair for pair in factors.items() if not (is_whole(pair[0], 0) and is_whole(pair[1], 1))]
        if wrong or not factors:
            found = f"{wrong[0][0]!r}: {wrong[0][1]!r}" if wrong else "nothing"
            raise ValueError(
                "`schedule` must map positions, whole numbers from 0 on, to values of `accumulate_grad_batches`, whole "
                f"numbers from 1 on, got {found}; write for instance {{0: 1, 1000: 2, 5000: 4}}."
            )
        self.unit = unit
        self._factors = sorted(factors.items())

    @property
    def lowest(self) -> int:
        """The smallest factor in the schedule."""
        return min(factor for _, factor in self._factors)

    def factor_at(self, position: float, before: int) -> int:
        """Return the factor at a position; ``before`` is the one before the first entry."""
        factor = before
        for start, scheduled in self._factors:
            if position >= start:
                factor = scheduled
        return factor
