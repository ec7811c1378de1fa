"""Tensors that all examples share until they are expanded to the batch, or added to it.

A class token, a bare position parameter, or the embedding of the positions 0..T-1 has no batch dimension, and
the gradient that reaches it is already summed over the examples. One node before, where it was broadcast, the
gradient still has the batch dimension: there it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_wn.per_example.rules.gradients import Dense, Form, Outer

ACCUMULATION = "torch::autograd::AccumulateGrad"

# operations on the shared tensor itself whose backward can be called again
RESHAPED = {
    "SliceBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "ViewBackward0",
    "UnsafeViewBackward0", "ReshapeAliasBackward0", "SelectBackward0", "PermuteBackward0", "TransposeBackward0",
    "TBackward0", "ToCopyBackward0", "CloneBackward0", "AliasBackward0",
}  # fmt: skip
ELEMENTWISE_OF_ONE = {
    "NegBackward0", "ExpBackward0", "Exp2Backward0", "Expm1Backward0", "LogBackward0", "Log1PBackward0",
    "Log2Backward0", "SqrtBackward0", "RsqrtBackward0", "ReciprocalBackward0", "AbsBackward0", "PowBackward0",
    "SoftplusBackward0", "SigmoidBackward0", "TanhBackward0", "ReluBackward0", "EluBackward0", "SiluBackward0",
    "GeluBackward0",
    "LogSigmoidBackward0", "LgammaBackward0", "DigammaBackward0", "SinBackward0", "CosBackward0", "ErfBackward0",
    "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0", "RsubBackward1", "SoftmaxBackward0",
    "LogSoftmaxBackward0",
}  # fmt: skip
_LINEAR = {"AddBackward0", "SubBackward0", "ExpandBackward0", "RepeatBackward0"}
# a node that is called gives the gradient before autograd adds up what was broadcast
_ELEMENTWISE = {
    "MulBackward0", "DivBackward0", "PowBackward1", "MaximumBackward0", "MinimumBackward0", "WhereBackward0",
    "Atan2Backward0", "XlogyBackward0", "AddcmulBackward0", "AddcdivBackward0", "LerpBackward0", "LerpBackward1",
    "MaskedFillBackward0", "HypotBackward0", "LogaddexpBackward0",
}  # fmt: skip
_PASSED = RESHAPED | ELEMENTWISE_OF_ONE | {"IndexBackward0"}
_BROADCASTS = _LINEAR | _ELEMENTWISE
# node -> which of its operands is the matrix, and the name under which it saved the other factor
_PRODUCTS = {"MmBackward0": (1, "_saved_self"), "AddmmBackward0": (2, "_saved_mat1")}
_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}

# from where the tensor meets the batch back to it: the node, the operand, and the operand's shape
_Path = tuple[tuple[Node, int, tuple[int, ...]], ...]


class SharedTensors:
    """Finds the nodes at which shared tensors meet the batch, and collects per-example gradients there.

    Args:
        loss: The tensor that is about to be back-propagated.
        batch_size: B.
        apart: Nodes behind which the graph is not followed.
    """

    def __init__(self, loss: Tensor, batch_size: int, apart: Collection[Node] = ()) -> None:
        self._batch_size = batch_size
        self._root = loss.grad_fn
        self._consumers: dict[Node, list[tuple[Node, int, int]]] = {}
        self._handles: list[Any] = []
        self._products = self._elementwise = False
        pending = [loss.grad_fn] if loss.grad_fn is not None else []
        seen = set(pending)
        while pending:
            consumer = pending.pop()
            for edge, (node, output) in enumerate(consumer.next_functions):
                if node is None or node in apart:
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
            if name in _PASSED | _BROADCASTS | {"ViewAsRealBackward0"}:
                if self.meets_batch(consumer, 0, result):
                    return True
            elif len(result) > len(shape) and result[0] == self._batch_size:
                return True  # by an operation that cannot be followed, such as a product
        return False

    def is_used(self, node: Node) -> bool:
        """Whether the loss depends on what the node made."""
        return node in self._consumers

    def uses(self, node: Node) -> int:
        """Count the operations that take what the node made."""
        return len(self._consumers.get(node, ()))

    def is_used_after(self, node: Node, sequence: int) -> bool:
        """Whether all operations that take what the node made were called later than that one."""
        return all(consumer._sequence_nr() > sequence for consumer, _, _ in self._consumers.get(node, ()))

    def is_used_before(self, node: Node, sequence: int) -> bool:
        """Whether all operations that take what the node made were called no later than that one."""
        return all(consumer._sequence_nr() <= sequence for consumer, _, _ in self._consumers.get(node, ()))

    def collect(
        self, node: Node, output: int, shape: Sequence[int], *, elementwise: bool = True, products: bool = False
    ) -> SharedGradient | None:
        """Watch all uses of a shared tensor; None if one of them cannot be followed.

        Args:
            node: What made it.
            output: Which of the node's results it is.
            shape: Its shape.
            elementwise: Whether it may meet the batch by other operations than sums and expansions.
            products: Whether it may be multiplied with the batch as a matrix.
        """
        packed = saved_tensors_are_packed()
        self._products, self._elementwise = products and not packed, elementwise and not packed
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
        if node is self._root:
            yield None  # it never met the batch
        for consumer, edge, used in self._consumers.get(node, ()):
            if used != output:
                continue
            step = ((consumer, edge, shape), *path)
            if (self._is_broadcast(consumer, shape) and self._may_meet(consumer)) or self._is_product(
                consumer, edge, path
            ):
                yield step
            elif consumer.name() in _PASSED | _BROADCASTS:
                yield from self._frontier(consumer, 0, _result_shape(consumer), step)
            else:
                yield None

    def _may_meet(self, consumer: Node) -> bool:
        return self._elementwise or consumer.name() in _LINEAR

    def _is_product(self, consumer: Node, edge: int, path: _Path) -> bool:
        """Whether rows of the batch are multiplied by the tensor, perhaps turned, or it is added to such a product."""
        name = consumer.name()
        if not self._products or not self._has_examples_first(consumer):
            return False
        if name == "AddmmBackward0" and edge == 0:
            return bool(consumer._saved_beta == 1)  # type: ignore[attr-defined]  # torch's node of this name has it
        if edge != _PRODUCTS.get(name, (None, ""))[0] or getattr(consumer, "_saved_alpha", 1) != 1:
            return False
        return all(node.name() in ("TBackward0", "ToCopyBackward0") for node, _, _ in path)

    def _has_examples_first(self, consumer: Node) -> bool:
        rows = _result_shape(consumer)[0] if _result_shape(consumer) else 0
        unfolded = [_result_shape(node) for node, _, _ in self._consumers.get(consumer, ()) if node.name() in _VIEWS]
        return rows == self._batch_size or any(shape[:1] == (self._batch_size,) for shape in unfolded)

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
    """Per-example gradients of one shared tensor, one form a use."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.forms: list[Form] = []

    @property
    def grad(self) -> Tensor | None:
        """The gradients added over the uses, shape (B, *tensor), where no use is a product."""
        dense = [form.grad for form in self.forms if isinstance(form, Dense)]
        return torch.stack(dense).sum(0) if dense else None

    def hook(self, path: _Path) -> Callable[[tuple[Tensor | None, ...]], None]:
        """Return a hook for the node at the start of the path, which ends at the tensor."""
        (meeting, edge, shape), *passed = path
        name = meeting.name()

        def see(grads: tuple[Tensor | None, ...]) -> None:
            if grads[0] is None:
                return
            with torch.no_grad():
                if edge == _PRODUCTS.get(name, (None, ""))[0]:
                    self.forms.append(self._product(meeting, grads[0].detach(), turned=_turns(passed)))
                    return
                grad = grads[0].detach()
                if name in _ELEMENTWISE:
                    results: Any = meeting(grad)  # type: ignore[operator]  # torch's nodes can be called
                    grad = results[edge] if isinstance(results, tuple) else results
                elif name in _LINEAR:
                    grad = grad * _factor(meeting, edge)
                if name == "AddmmBackward0":
                    grad = grad.reshape(self._batch_size, -1, grad.shape[1])
                padded = (self._batch_size, *(1,) * (grad.ndim - len(shape)), *shape)
                lifted = grad.to(torch.promote_types(grad.dtype, torch.float32))
                # (B, *rest) -> (B, 1, *rest): every example alone, reduced to what it has in common with the rest
                each = sum_to(lifted.unsqueeze(1), padded).reshape(self._batch_size, *shape)
                if passed:
                    each = torch.stack([_pull_back(row, passed) for row in each.to(grad.dtype)])
                    each = each.to(lifted.dtype)
                self.forms.append(Dense(each))

        return see

    def _product(self, node: Node, grad: Tensor, *, turned: bool) -> Outer:
        """Return Σ_t x_t ⊗ D_t of a product of x with the tensor, or with the tensor turned."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        saved: Tensor = getattr(node, _PRODUCTS[node.name()][1])
        x = saved.detach().conj().resolve_conj().to(wide).reshape(self._batch_size, 1, -1, saved.shape[1])
        grad = grad.to(wide).reshape(self._batch_size, 1, -1, grad.shape[1])
        return Outer(grad, x) if turned else Outer(x, grad)


def _turns(passed: Sequence[tuple[Node, int, tuple[int, ...]]]) -> bool:
    return sum(node.name() == "TBackward0" for node, _, _ in passed) % 2 == 1


def saved_tensors_are_packed() -> bool:
    """Whether saved tensors go through hooks (checkpointing, offloading), which bear being read only once.

    PyTorch 2.6 does not tell; there it is taken for true.
    """
    top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _pull_back(grad: Tensor, passed: Sequence[tuple[Node, int, tuple[int, ...]]]) -> Tensor:
    for node, edge, shape in passed:
        results: Any = node(grad)  # type: ignore[operator]  # torch's nodes can be called
        grad = results[edge] if isinstance(results, tuple) else results
        # the engine would undo what an addition broadcast; so it is done here
        grad = sum_to(grad, (1,) * (grad.ndim - len(shape)) + shape).reshape(shape)
    return grad


def sum_to(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Add up what was broadcast from this shape, of as many dimensions."""
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
