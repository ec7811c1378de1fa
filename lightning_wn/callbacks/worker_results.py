"""Brings a result home from worker processes that Lightning spawns or forks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class WorkerResults:
    """A few numbers in shared memory, written in a worker process and read in its parent.

    ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` run ``fit`` in copies of the callback, and nothing of
    them returns except the model's weights. A tensor in shared memory is the same in all copies.

    Args:
        size: How many numbers a result holds at most.

    Example:
        >>> results = WorkerResults(2)
        >>> results.hand_over([1.0, 2.0])
        >>> results.collect() is None  # a process does not get its own result
        True
    """

    def __init__(self, size: int) -> None:
        # element 0 counts the results
        self._shared = torch.zeros(1 + size, dtype=torch.float64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._seen = 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share the memory again: copying and unpickling leave it private."""
        self.__dict__.update(state)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def hand_over(self, numbers: Sequence[float]) -> None:
        """Leave a result for the parent process; a short one is filled up with zeros."""
        self._shared[1 : 1 + len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        self._shared[1 + len(numbers) :] = 0.0
        self._shared[0] += 1
        self._seen = float(self._shared[0])

    def collect(self) -> list[float] | None:
        """Return the result that another process left since the last look, if any."""
        serial = float(self._shared[0])
        if serial == self._seen:
            return None
        self._seen = serial
        return [float(value) for value in self._shared[1:]]
