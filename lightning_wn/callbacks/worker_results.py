"""Brings a result home from worker processes that Lightning spawns or forks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Mailbox:
    """A few numbers in shared memory, written in a worker process and read in its parent.

    ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` run ``fit`` in copies of the callback, and nothing of
    them returns except the model's weights. A tensor in shared memory is the same in all copies.

    Args:
        size: How many numbers a message holds at most.

    Example:
        >>> mailbox = Mailbox(2)
        >>> mailbox.post([1.0, 2.0])
        >>> mailbox.collect() is None  # a process does not get its own mail
        True
    """

    def __init__(self, size: int) -> None:
        # element 0 counts the messages
        self._shared = torch.zeros(1 + size, dtype=torch.float64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._seen = 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share the memory again: copying and unpickling leave it private."""
        self.__dict__.update(state)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def post(self, message: Sequence[float]) -> None:
        """Leave a message for the parent process; a short one is filled up with zeros."""
        self._shared[1 : 1 + len(message)] = torch.tensor(message, dtype=torch.float64)
        self._shared[1 + len(message) :] = 0.0
        self._shared[0] += 1
        self._seen = float(self._shared[0])

    def collect(self) -> list[float] | None:
        """Return the message that another process left since the last look, if any."""
        serial = float(self._shared[0])
        if serial == self._seen:
            return None
        self._seen = serial
        return [float(value) for value in self._shared[1:]]
