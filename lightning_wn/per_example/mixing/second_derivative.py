"""Differentiate one example's gradient, and what goes into late layers for it, by what other examples had early on.

A projection of the kept rows of ∂L/∂a is differentiated by a: where examples do not mix, the other rows are exactly
zero. Sees what is smooth, however little it is. Blind where the loss is linear in the outputs and the network piecewise
linear; there the same is asked of the tensors between the layers and the loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_wn.noise_scale.curvature import ends_in_an_error, twice_differentiable
from lightning_wn.per_example.engine.layers import BatchDim
from lightning_wn.per_example.mixing.finite_swap import Reference
from lightning_wn.per_example.mixing.passes import Key, Layers, Subject, nodes_behind
from lightning_wn.per_example.mixing.report import CannotLookError, Find
from lightning_wn.per_example.mixing.rows import by_example

# exactly zero where examples are apart
_TOLERANCE = 1e-6
_LATE = 256


def differentiate_twice(subject: Subject, reference: Reference, generator: torch.Generator) -> Find | None:
    """Look for rows of other examples that the kept ones depend on.

    Raises:
        CannotLookError: If the loss cannot be differentiated twice, and its first derivatives show nothing.
    """
    graph = _Graph(subject, reference, generator)
    with subject.replica() as replica, twice_differentiable():
        tail = _Tail(subject.batch_size)
        Layers(
            replica, subject.batch_size, subject.dims, reference.shared, swap=None, see_input=graph.see_input,
            see_output=graph.see_output,
        )  # fmt: skip
        with tail:
            loss = subject.loss(replica, subject.batch)
        return graph.search(loss, tail)


class _Graph:
    """The tensors of one forward pass, with their history."""

    def __init__(self, subject: Subject, reference: Reference, generator: torch.Generator) -> None:
        self._subject = subject
        self._kept = reference.swaps[0].kept
        self._generator = generator
        self._late: dict[Key, tuple[Tensor, BatchDim]] = {}
        self._early: dict[Key, tuple[Tensor, BatchDim]] = {}

    def see_input(self, key: Key, tensor: Tensor, dim: BatchDim) -> None:
        """Keep what goes into a layer; nothing is computed of it here, perhaps in a checkpoint."""
        if tensor.requires_grad and torch._C._current_graph_task_id() == -1:
            self._late[key] = (tensor, dim)

    def see_output(self, key: Key, tensor: Tensor, dim: BatchDim) -> None:
        """Keep what can be differentiated by."""
        if tensor.grad_fn is not None and torch._C._current_graph_task_id() == -1:
            self._early[key] = (tensor, dim)

    def search(self, loss: Tensor, tail: _Tail) -> Find | None:
        """Go through what may depend on other examples: late layers, gradients, and what the loss is made of."""
        if not self._early:
            raise CannotLookError("no layer gives a tensor with rows that can be differentiated by")
        keys = list(self._early)
        slopes = dict(zip(keys, self._differentiate(loss, keys, create_graph=True), strict=True))
        counting = {key[0] for key, slope in slopes.items() if slope is not None}
        late = [self._rows(*seen, kept=True) for key, seen in self._late.items() if key[0] in counting]
        found = self._find(late, keys, "for one example, what comes into a layer behind")[0]
        if found is not None:
            return found
        curved: Mapping[Key, float] = {}
        refused = ""
        known = [slope for slope in slopes.values() if slope is not None]
        if ends_in_an_error(known):
            refused = "an operation is marked `once_differentiable`"
        else:
            rows = [
                self._rows(slope, self._early[key][1], kept=True)
                for key, slope in slopes.items()
                if slope is not None and slope.requires_grad
            ]
            try:
                found, curved = self._find(rows, keys, "the gradient of one example depends on others at")
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                refused = f"an operation has no second derivative ({first_line(error)})"
        if found is None and not refused:
            straight = [key for key in keys if slopes[key] is not None and not curved.get(key, 0.0)]
            late = [self._rows(tensor, 0, kept=True) for tensor in tail.of(loss)]
            found = self._find(late, straight, "for one example, what the loss is made of behind")[0]
        if found is None and refused:
            raise CannotLookError(refused)
        return found

    def _find(self, rows: Sequence[Tensor], keys: Sequence[Key], what: str) -> tuple[Find | None, Mapping[Key, float]]:
        """Differentiate a random projection of the rows; also say how much each tensor's own rows matter."""
        own: dict[Key, float] = {}
        if not rows or not keys:
            return None, own
        # the same sign everywhere would let what is centred over the batch vanish
        projection = torch.stack([self._project(part) for part in rows if part.requires_grad] or [torch.zeros(())])
        if not projection.requires_grad:
            return None, own
        worst = (0.0, "")
        for key, grad in zip(keys, self._differentiate(projection.sum(), keys), strict=True):
            if grad is None:
                continue
            dim = self._early[key][1]
            mine, others = (float(self._rows(grad.detach(), dim, kept=kept).abs().sum()) for kept in (True, False))
            own[key] = mine
            # NaN is no find
            if others > _TOLERANCE * mine:
                worst = max(worst, (others, key[0]))
        return (Find(self._subject.label(worst[1]), what) if worst[0] else None), own

    def _differentiate(self, of: Tensor, keys: Sequence[Key], *, create_graph: bool = False) -> Sequence[Tensor | None]:
        tensors = [self._early[key][0] for key in keys]
        return torch.autograd.grad(of, tensors, create_graph=create_graph, retain_graph=True, allow_unused=True)

    def _project(self, rows: Tensor) -> Tensor:
        weights = torch.randn(rows.shape, generator=self._generator, dtype=torch.float32)
        product = rows * weights.to(rows.device, rows.dtype)
        return (product.real if product.is_complex() else product).sum().to("cpu", torch.float64)

    def _rows(self, tensor: Tensor, dim: BatchDim, *, kept: bool) -> Tensor:
        mask = torch.zeros(self._subject.batch_size, dtype=torch.bool)
        mask[self._kept] = True
        return by_example(tensor, dim, self._subject.batch_size)[(mask if kept else ~mask).to(tensor.device)]


class _Tail(TorchFunctionMode):
    """Keeps the last tensors of a forward pass that have one row an example."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self._batch_size = batch_size
        self._seen: deque[Tensor] = deque(maxlen=_LATE)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        result = func(*args, **(kwargs or {}))
        # two dimensions of that length cannot be told apart
        if (
            isinstance(result, Tensor)
            and result.requires_grad
            and result.shape[:1] == (self._batch_size,)
            and self._batch_size not in result.shape[1:]
        ):
            self._seen.append(result)
        return result

    def of(self, loss: Tensor) -> list[Tensor]:
        """Return those that the loss depends on."""
        nodes = nodes_behind(loss)
        return [tensor for tensor in self._seen if tensor.grad_fn in nodes]


def first_line(error: BaseException) -> str:
    """Return the start of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
