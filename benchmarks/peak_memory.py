"""The peak of live tensor bytes inside a block of code, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, from the operation that makes them until they are freed.

    Every operation of the forward pass, the backward pass and the optimizer passes by. What a kernel allocates
    and frees by itself does not, and neither does the allocator's rounding.

    Attributes:
        current: Bytes made inside that are alive.
        peak: The largest value that ``current`` had.

    Example:
        >>> with PeakMemory() as memory:
        ...     x = torch.zeros(1000)
        ...     y = (x + 1).sum()
        >>> memory.peak, memory.current  # x, x + 1 and the sum; x and the sum
        (8004, 4004)
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it makes."""
        kwargs = kwargs or {}
        # views and results written in place have the storage of an argument, which may be older than the block
        known = {_storage(t)._cdata for t in pytree.tree_leaves((args, kwargs)) if _is_plain(t)}
        result = func(*args, **kwargs)
        for tensor in pytree.tree_leaves(result):
            if _is_plain(tensor):
                self._see(_storage(tensor), known)
        return result

    def _see(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = size
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.current -= self._alive.pop(key, 0)


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak of live bytes that one call makes, beyond what was there before."""
    with PeakMemory() as memory:
        function()
    return memory.peak
