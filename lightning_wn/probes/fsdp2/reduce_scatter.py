"""The reduce-scatter that shows a probe what each rank hands to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class TappedReduceScatter:
    """A reduce-scatter after torch's protocol that shows its input and otherwise does what another one does.

    Args:
        inner: The other one.
        index: Which parameter group's it is.
        see_gradient: Called with ``index``, the input and the reduction, before it is reduced.
    """

    def __init__(self, inner: Any, index: int, see_gradient: Callable[[int, Tensor, Any], None]) -> None:
        self.inner = inner
        self.closed = False
        self._index = index
        self._see_gradient = see_gradient

    @property
    def open_inner(self) -> Any:
        """What this one replaced, past those that have been closed since."""
        inner = self.inner
        while isinstance(inner, TappedReduceScatter) and inner.closed:
            inner = inner.inner
        return inner

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a buffer for the communication."""
        buffer: Tensor = self.inner.allocate(size, dtype=dtype, device=device)
        return buffer

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: torch.distributed.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Show the input, then reduce and scatter it."""
        if not self.closed:
            self._see_gradient(self._index, input_tensor, op)
        return self.inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op, async_op=async_op)
