"""Terms of the loss that depend on weights alone: penalties. They add the same gradient to every example's.

They are found in the graph of the loss, behind sums of scalars: a branch that holds nothing but parameters, what was
computed of them, and Python's numbers. Whatever could hold data (a constant tensor, an operation that is not listed)
makes it no such term. Its gradient comes from calling its nodes in reverse, which fires no hook and leaves the graph as
it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_wn.per_example.engine.layers import Layer
from lightning_wn.per_example.engine.shared_tensors import ACCUMULATION, ELEMENTWISE_OF_ONE, RESHAPED, sum_to
from lightning_wn.per_example.rules.errors import PerExampleError
from lightning_wn.per_example.rules.gradients import Common

_SCALAR_SUMS = {"AddBackward0", "SubBackward0", "NegBackward0", "MulBackward0", "DivBackward0", "CloneBackward0"}
# their operands are either in the graph or a number
_OF_WEIGHTS = RESHAPED | ELEMENTWISE_OF_ONE | {
    "AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "PowBackward1", "MaximumBackward0",
    "MinimumBackward0", "SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1", "VarBackward0",
    "StdBackward0", "LinalgVectorNormBackward0", "NormBackward0", "NormBackward1", "MaxBackward1", "AmaxBackward0",
    "LogsumexpBackward0", "MmBackward0", "BmmBackward0", "MvBackward0", "DotBackward0", "CatBackward0",
    "StackBackward0", "ExpandBackward0",
}  # fmt: skip


class WeightTerms:
    """The weight-only terms of one loss.

    Args:
        loss: The tensor that is about to be back-propagated.
        parameters: All parameters of the model, by identity.

    Attributes:
        nodes: Where the terms begin: they need not be followed.
    """

    def __init__(self, loss: Tensor, parameters: Collection[int]) -> None:
        self._parameters = parameters
        self._known: dict[Node, bool] = {}
        self._terms: list[tuple[Node, float]] = []
        if loss.grad_fn is not None and loss.numel() == 1:
            self._look_for_terms(loss.grad_fn)
        self.nodes = {node for node, _ in self._terms}

    def _look_for_terms(self, root: Node) -> None:
        pending = [(root, 1.0)]
        while pending:
            node, factor = pending.pop()
            if self._is_of_weights(node):
                self._terms.append((node, factor))
            elif node.name() in _SCALAR_SUMS and not _shape(node):
                factors = _factors(node)
                edges = zip(node.next_functions, factors, strict=False)
                pending += [
                    (source, factor * own) for (source, _), own in edges if source is not None and own is not None
                ]

    def _is_of_weights(self, root: Node) -> bool:
        """Whether nothing below holds data; without recursion, as sums over parameters are deep."""
        pending = [root]
        while pending:
            node = pending[-1]
            if node in self._known:
                pending.pop()
                continue
            variable = getattr(node, "variable", None)
            sources = [source for source, _ in node.next_functions]
            if variable is not None:
                self._known[node] = id(variable) in self._parameters
            elif (
                node.name() not in _OF_WEIGHTS
                or not _constants_are_numbers(node)
                or any(self._known.get(s) is False for s in sources if s is not None)
            ):
                self._known[node] = False
            elif unknown := [s for s in sources if s is not None and s not in self._known]:
                pending += unknown
            else:
                self._known[node] = any(sources) and all(self._known[s] for s in sources if s is not None)
        return self._known[root]

    def in_common(self, layers: Sequence[Layer], batch_size: int, shares: Tensor | None) -> dict[int, Common]:
        """Return what the terms add to each example's gradient, by the identity of the parameters.

        Args:
            layers: Whose parameters count.
            batch_size: B.
            shares: Each example's share of the loss, shape (B,); None is equal ones.

        Raises:
            PerExampleError: For a term of a weight that is computed from others.
        """
        found: dict[int, Common] = {}
        gradients = self.gradients() if self._terms else {}
        for layer in layers:
            for key, grad in [(id(p), gradients[id(p)]) for p in layer.parameters.values() if id(p) in gradients]:
                if any(slot.weight_norm is not None for slot in layer.slots.values()):
                    raise PerExampleError(
                        f"the loss has a term of the weights of {layer.label} alone, and these are weight-normalized: "
                        "let the optimizer decay the weights instead, or leave the layer out of the measured ones"
                    )
                wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
                own = torch.full((batch_size,), 1.0 / batch_size, dtype=torch.float64) if shares is None else shares
                found[key] = Common(own.to(dtype=wide.dtype.to_real()).to(wide.device), wide)
        return found

    def gradients(self) -> dict[int, Tensor]:
        """Return the gradient of all terms by the parameters, by identity."""
        found: dict[int, Tensor] = {}
        arrived: dict[Node, Tensor] = {}
        order: list[tuple[int, int, Node]] = []

        def add(node: Node, grad: Tensor) -> None:
            variable = getattr(node, "variable", None)
            if variable is not None:
                found[id(variable)] = found[id(variable)] + grad if id(variable) in found else grad
                return
            if node not in arrived:
                heapq.heappush(order, (-node._sequence_nr(), id(node), node))
            arrived[node] = arrived[node] + grad if node in arrived else grad

        with torch.no_grad():
            for node, factor in self._terms:
                variable = getattr(node, "variable", None)
                if variable is not None:
                    add(node, torch.full_like(variable, factor))
                    continue
                metadata: Any = node._input_metadata
                add(node, torch.full(_shape(node), factor, dtype=metadata[0].dtype, device=metadata[0].device))
            while order:
                node = heapq.heappop(order)[2]
                results: Any = node(arrived.pop(node))  # type: ignore[operator]  # torch's nodes can be called
                parts = results if isinstance(results, tuple) else (results,)
                for (source, _), part in zip(node.next_functions, parts, strict=False):
                    if source is not None and part is not None:
                        shape = _shape(source)
                        add(source, sum_to(part, (1,) * (part.ndim - len(shape)) + shape).reshape(shape))
        return found


def _factors(node: Node) -> list[float | None]:
    """Return what each operand of a scalar sum is multiplied by, None where that is no number."""
    name = node.name()
    if name in ("NegBackward0", "CloneBackward0"):
        return [-1.0 if name == "NegBackward0" else 1.0]
    if name in ("AddBackward0", "SubBackward0"):
        alpha = float(getattr(node, "_saved_alpha", 1.0))
        return [1.0, -alpha if name == "SubBackward0" else alpha]
    left, right = (number_of(getattr(node, key, None)) for key in ("_saved_self", "_saved_other"))
    sources = [source for source, _ in node.next_functions]
    if name == "DivBackward0":
        return [None if sources[1] is not None or not right else 1.0 / right, None]
    return [right if sources[1] is None else None, left if sources[0] is None else None]


def _constants_are_numbers(node: Node) -> bool:
    """Whether operands that are not in the graph are Python's numbers."""
    sources = [source for source, _ in node.next_functions]
    if all(source is not None for source in sources):
        return True
    if node.name() not in ("MulBackward0", "DivBackward0"):
        return False
    keys = ("_saved_self", "_saved_other")
    missing = [key for key, source in zip(keys, sources, strict=True) if source is None]
    # the numerator of a fraction is saved only for the denominator's sake
    return all(number_of(getattr(node, key, None)) is not None for key in missing)


def number_of(saved: Any) -> float | None:
    """Return a saved operand that was a number in Python, None if it was a tensor."""
    if isinstance(saved, float | int):
        return float(saved)
    if not isinstance(saved, Tensor) or saved.ndim or saved.device.type != "cpu":
        return None
    # only a number gives way to another scalar's type
    small = torch.float16 if saved.is_floating_point() else torch.int8
    widest = saved.dtype in (torch.float64, torch.int64)
    return float(saved) if widest and torch.result_type(saved, torch.zeros((), dtype=small)) == small else None


def _shape(node: Node) -> tuple[int, ...]:
    if node.name() == ACCUMULATION:
        variable: Any = node
        return tuple(variable.variable.shape)
    metadata: Any = node._input_metadata
    return tuple(metadata[0].shape)
