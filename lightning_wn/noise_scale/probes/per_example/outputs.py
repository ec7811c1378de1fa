"""The gradient by a module's output, as the backward pass delivers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


class OutputGradient:
    """Waits at the graph node that made an output for the gradient that this node is about to use.

    The hook is on the node and not on the tensor, so that it sees the gradient after all hooks on the tensor.
    What is done in place to the output later makes new nodes and does not move this one, with one exception:
    for a view autograd rewrites the history of the tensor that it is a view of. Linear with three dimensions
    and a bias, and InstanceNorm, return a view of all of a tensor that nobody else has, and their hook is put
    on the node that made that one.

    Args:
        output: A tensor that came out of a module.
        private: Whether nobody but the module can hold what the output is a view of.
        arrived: Called once the gradient is here.
    """

    def __init__(self, output: Tensor, *, private: bool, arrived: Callable[[], None] | None) -> None:
        self.shape = output.shape
        self.grad: Tensor | None = None
        self.arrivals = 0
        self._arrived = arrived
        self._watched: tuple[Tensor, int] | None = None
        self._handle: Any = None
        self.node: Node | None = output.grad_fn
        self.is_parameter = output.requires_grad and output.is_leaf
        source = output
        base = output._base
        if base is not None:
            if private and base.grad_fn is not None and _is_all_of(output, base):
                source = base
                self.node = base.grad_fn
            else:
                self._watched = (output.detach(), output._version)
        self.index = source.output_nr
        # consumers of the output hang on its own node, whichever node the gradient is taken at
        self.edge = (output.grad_fn, output.output_nr)
        if self.node is not None:
            self._handle = self.node.register_prehook(self._see)

    def _see(self, grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[self.index]
        if grad is None:
            return
        self.arrivals += 1
        self.grad = grad.detach().reshape(self.shape)
        if self._arrived is not None:
            self._arrived()
            self.grad = None

    def may_be_missed(self) -> bool:
        """Whether the output is a view that was changed in place, so that the gradient took another way."""
        return self._watched is not None and self._watched[0]._version != self._watched[1]

    def remove(self) -> None:
        """Stop waiting."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._arrived = None
        self.grad = None


def _is_all_of(view: Tensor, base: Tensor) -> bool:
    return (
        view.numel() == base.numel()
        and view.dtype == base.dtype
        and view.is_contiguous()
        and base.is_contiguous()
        and view.storage_offset() == base.storage_offset()
    )


def accumulation_node(parameter: Tensor) -> Node:
    """Return the node that adds into a parameter's ``.grad``."""
    return torch.autograd.graph.get_gradient_edge(parameter).node
