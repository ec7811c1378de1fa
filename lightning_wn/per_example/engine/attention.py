"""Rule for ``nn.MultiheadAttention``: its projections are linear layers, but no modules.

Its forward multiplies by its parameters itself, so no module hook sees what goes into a projection or the
gradient that comes back. The autograd graph does: the node of each product is about to use the gradient of the
projection's result, and it saved the projection's input. Hooks on these nodes give both factors of the weight's
gradient, whatever lies between the projections (masks, dropout, returned attention weights), and nothing is
run again. Where the graph does not look as it should, the generic rule takes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_wn.per_example.engine.shared_tensors import saved_tensors_are_packed
from lightning_wn.per_example.rules.errors import reached_twice
from lightning_wn.per_example.rules.gradients import Dense, Form, Outer
from lightning_wn.per_example.rules.registry import computes_like

# node -> which of its operands is the weight, and the name under which it saved the other factor
_PRODUCTS = {"MmBackward0": (1, "_saved_self"), "AddmmBackward0": (2, "_saved_mat1")}
# node -> which of its operands is the bias
_ADDITIONS = {"AddmmBackward0": 0, "AddBackward0": 1}
# what lies between a parameter and its use
_CAST_OR_TURNED = {"TBackward0", "ToCopyBackward0"}
_SPLIT = {"SplitBackward0", "SplitWithSizesBackward0"}


@dataclass
class Projection:
    """One use of a parameter, or of some of its rows.

    Attributes:
        node: The graph node that adds the bias or multiplies by the weight.
        name: The parameter's name in the module.
        first: The first of the rows.
        saved: Under which name the node keeps the input of the projection; empty for a bias.
    """

    node: Node
    name: str
    first: int
    saved: str


@dataclass
class AttentionCall:
    """One call of a module whose projections were found in the graph.

    Attributes:
        name: The module's name.
        parameters: The measured parameters, by name in the module.
        examples: The length of the dimension that has the batch, inside the module the second.
        fold: How many successive entries of that dimension are one example.
        take: Called with a parameter's name and its gradients, once these are known.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    examples: int
    fold: int
    take: Callable[[str, Form], None]
    _waiting: dict[str, int] = field(default_factory=dict)
    _pieces: dict[str, list[tuple[int, Tensor, Tensor | None]]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def follow(self, projections: Sequence[Projection], attempt: Callable[..., None]) -> None:
        """Wait at the nodes; ``attempt`` calls a function and keeps its error."""
        for projection in projections:
            self._waiting[projection.name] = self._waiting.get(projection.name, 0) + 1

            def see(grads: tuple[Tensor | None, ...], projection: Projection = projection) -> None:
                if grads[0] is not None:
                    attempt(self._arrived, projection, grads[0])

            self._handles.append(projection.node.register_prehook(see))

    def _arrived(self, projection: Projection, grad: Tensor) -> None:
        name = projection.name
        if self._waiting[name] == 0:
            raise reached_twice(self.name)
        with torch.no_grad():
            x = self._by_example(getattr(projection.node, projection.saved)) if projection.saved else None
            self._pieces.setdefault(name, []).append((projection.first, self._by_example(grad), x))
        self._waiting[name] -= 1
        if self._waiting[name] == 0:
            self._give(name)

    def _by_example(self, rows: Tensor) -> Tensor:
        """(T·N, features) or (T, N, features) -> (N, T, features), as autograd may free the rest."""
        wide = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        return wide.reshape(-1, self.examples, rows.shape[-1]).transpose(0, 1)

    def _give(self, name: str) -> None:
        shape = self.parameters[name].shape
        pieces = self._pieces.pop(name)
        with torch.no_grad(), torch.autocast(pieces[0][1].device.type, enabled=False):
            form: Form
            if len(shape) == 1:
                form = _bias(pieces, shape[0])
            else:
                form = _weight([(first, left, right) for first, left, right in pieces if right is not None], shape[0])
            self.take(name, form.merge(self.fold) if self.fold > 1 else form)

    def finish(self) -> None:
        """Give what has arrived: the loss may depend on the attention weights alone, which use no values."""
        for name in list(self._pieces):
            self._give(name)

    def remove(self) -> None:
        """Stop waiting."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._pieces = {}


def _bias(pieces: Sequence[tuple[int, Tensor, Tensor | None]], rows: int) -> Dense:
    grad = pieces[0][1].new_zeros(len(pieces[0][1]), rows)
    for first, part, _ in pieces:
        grad[:, first : first + part.shape[2]] = part.sum(1)
    return Dense(grad)


def _weight(pieces: Sequence[tuple[int, Tensor, Tensor]], rows: int) -> Outer:
    """Join the gradients of a weight's parts: each part of its rows has its own input, and perhaps length."""
    first, left, right = pieces[0]
    if left.shape[2] == rows:
        return Outer(left.unsqueeze(1), right.unsqueeze(1))
    part = math.gcd(rows, *(n for first, left, _ in pieces for n in (first, left.shape[2])))
    length = max(left.shape[1] for _, left, _ in pieces)
    lefts = left.new_zeros(len(left), rows // part, length, part)
    rights = right.new_zeros(len(right), rows // part, length, right.shape[2])
    for first, left, right in pieces:
        for index, columns in enumerate(torch.split(left, part, dim=2), start=first // part):
            lefts[:, index, : left.shape[1]] = columns
            rights[:, index, : left.shape[1]] = right
    return Outer(lefts, rights)


def batch_length(module: nn.Module, outputs: Sequence[Tensor]) -> int | None:
    """Return the length of the dimension that has the batch, None if this is no plain call of attention."""
    if not isinstance(module, nn.MultiheadAttention) or not computes_like(module, nn.MultiheadAttention):
        return None
    return outputs[0].shape[0 if module.batch_first else 1] if outputs[0].ndim == 3 else None


def find_projections(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> list[Projection] | None:  # fmt: skip
    """Find the uses of the measured parameters in the graph between the module's inputs and outputs.

    Returns:
        None if one is used in another way.
    """
    assert isinstance(module, nn.MultiheadAttention)
    if saved_tensors_are_packed():
        return None
    names = {id(p): name for name, p in parameters.items()}
    found: list[Projection] = []
    pending = [o.grad_fn for o in outputs if o.grad_fn is not None]
    seen = {*pending, *(x.grad_fn for x in inputs if x.grad_fn is not None)}
    while pending:
        node = pending.pop()
        if id(getattr(node, "variable", None)) in names:
            return None
        kind = node.name()
        for operand, (source, output) in enumerate(node.next_functions):
            use: Projection | None = None
            if source is not None and operand == _PRODUCTS.get(kind, (None, ""))[0]:
                use = _use(module, node, (source, output), names, _PRODUCTS[kind][1])
            elif source is not None and operand == _ADDITIONS.get(kind):
                use = _use(module, node, (source, output), names, "")
            if use is not None:
                found.append(use)
            elif source is not None and source not in seen:
                seen.add(source)
                pending.append(source)
    return found if {use.name for use in found} == set(parameters) else None


def _use(
    module: nn.MultiheadAttention, node: Node, edge: tuple[Node | None, int], names: Mapping[int, str], saved: str
) -> Projection | None:
    """Follow an operand back to a parameter: a matrix where it is multiplied by, a vector where it is added."""
    source, output = edge
    part = 0
    while source is not None and source.name() in _CAST_OR_TURNED | _SPLIT:
        part = output if source.name() in _SPLIT else part
        source, output = source.next_functions[0]
    parameter = getattr(source, "variable", None)
    if parameter is None or id(parameter) not in names or parameter.ndim != (2 if saved else 1):
        return None
    # packed projections are split 1 + 1 + 1 or 1 + 2 times as long as the module is wide
    return Projection(node, names[id(parameter)], part * module.embed_dim, saved)
