"""Tensors that all examples share until they are expanded to the batch, or added to it.

A class token, a bare position parameter, or the embedding of the positions 0..T-1 has no batch dimension, and
the gradient that reaches it is already summed over the examples. One node before, where it was broadcast, the
gradient still has the batch dimension: there it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

# operations on the shared tensor itself whose backward can be called again; they save sizes or nothing
_PASSED = {
    "SliceBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "ViewBackward0",
    "UnsafeViewBackward0", "ReshapeAliasBackward0", "SelectBackward0", "PermuteBackward0", "TransposeBackward0",
    "TBackward0", "ToCopyBackward0", "CloneBackward0", "AliasBackward0", "NegBackward0", "IndexBackward0",
}  # fmt: skip
_BROADCASTS = {"AddBackward0", "SubBackward0", "ExpandBackward0", "RepeatBackward0"}

# from where the tensor meets the batch back to it: the node, the operand, and the operand's shape
_Path = tuple[tuple[Node, int, tuple[int, ...]], ...]


class SharedTensors:
    """Finds the nodes at which shared tensors meet the batch, and collects per-example gradients there.

    Args:
        loss: The tensor that is about to be back-propagated.
        batch_size: B.
    """

    def __init__(self, loss: Tensor, batch_size: int) -> None:
        self._batch_size = batch_size
        self._consumers: dict[Node, list[tuple[Node, int, int]]] = {}
        self._handles: list[Any] = []
        pending = [loss.grad_fn] if loss.grad_fn is not None else []
        seen = set(pending)
        while pending:
            consumer = pending.pop()
            for edge, (node, output) in enumerate(consumer.next_functions):
                if node is None:
                    continue
                self._consumers.setdefault(node, []).append((consumer, edge, output))
                if node not in seen:
                    seen.add(node)
                    pending.append(node)

    def meets_batch(self, node: Node, output: int, shape: Sequence[int]) -> bool:
        """Whether some use of the tensor broadcasts it to the batch."""
        for consumer, _, used in self._consumers.get(node, ()):
            if used != output:
                continue
            if self._is_broadcast(consumer, shape):
                return True
            name, result = consumer.name(), _result_shape(consumer)
            if name in _PASSED | _BROADCASTS:
                if self.meets_batch(consumer, 0, result):
                    return True
            elif len(result) > len(shape) and result[0] == self._batch_size:
                return True  # by an operation that cannot be followed, such as a product
        return False

    def is_used(self, node: Node) -> bool:
        """Whether the loss depends on what the node made."""
        return node in self._consumers

    def collect(self, node: Node, output: int, shape: Sequence[int]) -> SharedGradient | None:
        """Watch all uses of a shared tensor; None if one of them is neither an expansion nor an addition."""
        found = list(self._frontier(node, output, tuple(shape), ()))
        if not found or any(path is None for path in found):
            return None
        shared = SharedGradient(self._batch_size)
        for path in found:
            assert path is not None
            hook = shared.hook(path)
            self._handles.append(path[0][0].register_prehook(hook))
        return shared

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._consumers = {}

    def _frontier(self, node: Node, output: int, shape: tuple[int, ...], path: _Path) -> Iterator[_Path | None]:
        """Yield, for each use, the way back from where the tensor meets the batch; None for an unknown use."""
        for consumer, edge, used in self._consumers.get(node, ()):
            if used != output:
                continue
            step = ((consumer, edge, shape), *path)
            if self._is_broadcast(consumer, shape):
                yield step
            elif consumer.name() in _PASSED | _BROADCASTS:
                yield from self._frontier(consumer, 0, _result_shape(consumer), step)
            else:
                yield None

    def _is_broadcast(self, consumer: Node, shape: Sequence[int]) -> bool:
        if consumer.name() not in _BROADCASTS:
            return False
        result = _result_shape(consumer)
        if not result or result[0] != self._batch_size:
            return False
        padded = (1,) * (len(result) - len(shape)) + tuple(shape)
        # a repeated dimension other than 1 is no plain broadcast
        fits = all(a in (1, b) for a, b in zip(padded, result, strict=True))
        return fits and (len(shape) < len(result) or padded[0] != result[0])


class SharedGradient:
    """Per-example gradients of one shared tensor, added over its uses."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.grad: Tensor | None = None

    def hook(self, path: _Path) -> Callable[[tuple[Tensor | None, ...]], None]:
        """Return a hook for the node at the start of the path, which ends at the tensor."""
        (meeting, edge, shape), *passed = path
        sign = _factor(meeting, edge)

        def see(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[0]
            if grad is None:
                return
            with torch.no_grad():
                padded = (self._batch_size, *(1,) * (grad.ndim - len(shape)), *shape)
                lifted = grad.detach().to(torch.promote_types(grad.dtype, torch.float32)) * sign
                # (B, *rest) -> (B, 1, *rest): every example alone, reduced to what it has in common with the rest
                each = _sum_to(lifted.unsqueeze(1), padded).reshape(self._batch_size, *shape)
                if passed:
                    each = torch.stack([_pull_back(row, passed) for row in each.to(grad.dtype)])
                    each = each.to(lifted.dtype)
                self.grad = each if self.grad is None else self.grad + each

        return see


def _pull_back(grad: Tensor, passed: Sequence[tuple[Node, int, tuple[int, ...]]]) -> Tensor:
    for node, edge, shape in passed:
        results: Any = node(grad)  # type: ignore[operator]  # torch's nodes can be called
        grad = results[edge] if isinstance(results, tuple) else results
        # the engine would undo what an addition broadcast; so it is done here
        grad = _sum_to(grad, (1,) * (grad.ndim - len(shape)) + shape).reshape(shape)
    return grad


def _sum_to(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    dims = [d for d, (have, want) in enumerate(zip(tensor.shape, shape, strict=True)) if have != want]
    return tensor.sum(dims, keepdim=True) if dims else tensor


def _factor(node: Node, edge: int) -> float:
    """Return ∂output/∂operand of an addition or expansion."""
    if node.name() == "ExpandBackward0" or node.name() == "RepeatBackward0" or edge == 0:
        return 1.0
    alpha = float(getattr(node, "_saved_alpha", 1.0))
    return -alpha if node.name() == "SubBackward0" else alpha


def _result_shape(node: Node) -> tuple[int, ...]:
    """Return the shape of what a node computed in the forward pass."""
    metadata: Any = node._input_metadata
    return tuple(metadata[0].shape)
