"""Brings a result home from worker processes that Lightning spawns or forks."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch

_ROOM = 2**18  # bytes; the estimates of one optimizer take about 2,000


class WorkerResults:
    """A piece of shared memory that a worker process writes its result to, and its parent reads.

    ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` run ``fit`` in copies of the callback, and nothing of
    them returns except the model's weights. A tensor in shared memory is the same in all copies.
    """

    def __init__(self) -> None:
        # how many results were handed over so far, and how long the last one is
        self._count_and_length = torch.zeros(2, dtype=torch.int64)
        self._content = torch.zeros(_ROOM, dtype=torch.uint8)
        self._seen = 0
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share the memory again: copying and unpickling leave it private."""
        self.__dict__.update(state)
        self._share()

    def hand_over(self, result: Any) -> None:
        """Leave tensors and primitives, nested as they like, for the parent process.

        Raises:
            ValueError: If there is no room for so many.
        """
        file = BytesIO()
        torch.save(result, file)
        length = file.tell()
        if length > _ROOM:
            raise ValueError(
                f"results of {length:,} bytes are too large to come home from spawned processes, which have room for "
                f"{_ROOM:,}; use `strategy='ddp'`."
            )
        self._content[:length] = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        self._seen = int(self._count_and_length[0]) + 1
        self._count_and_length.copy_(torch.tensor([self._seen, length]))

    def collect(self) -> Any:
        """Return the result that another process left since the last look; None if there is none."""
        count, length = self._count_and_length.tolist()
        if count == self._seen:
            return None
        self._seen = count
        return torch.load(BytesIO(self._content[:length].numpy().tobytes()), weights_only=True)

    def _share(self) -> None:
        for tensor in (self._count_and_length, self._content):
            tensor.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
