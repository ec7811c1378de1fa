"""One forward and backward pass on a copy of the model, and what went through its layers for some of the examples."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_wn.per_example.engine.batch_axes import has_own_axes, input_axes, output_axes
from lightning_wn.per_example.engine.layers import BatchDim
from lightning_wn.per_example.mixing.batches import clone_batch
from lightning_wn.per_example.mixing.copies import RandomState, fresh_copy, without_global_hooks
from lightning_wn.per_example.mixing.report import CannotLookError
from lightning_wn.per_example.mixing.rows import Swap, by_example, has_rows
from lightning_wn.per_example.rules.errors import name_of

Key = tuple[str, int, int]
"""A tensor of a pass: the module's name, the number of its call, and the tensor's place in the call."""

Rows = dict[Key, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        model: The model; it is only copied.
        loss_fn: Computes the loss from a copy and a batch.
        batch: The batch.
        batch_size: B.
        dims: By module, where the examples are, None for what all examples share; modules that are not named have
            them in dimension 0, if what they give depends on the batch.
        copier: Copies the model.
        random_state: What every pass starts from.
    """

    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Any]
    batch: Any
    batch_size: int
    dims: Mapping[str, BatchDim | None]
    copier: Callable[[nn.Module], nn.Module]
    random_state: RandomState

    def label(self, name: str) -> str:
        """How messages call a module."""
        return name_of(self.model.get_submodule(name), name)

    @contextlib.contextmanager
    def replica(self, *, other_numbers: bool = False) -> Iterator[nn.Module]:
        """Give a copy on which everything may be called: no user's hook, the same random numbers, nothing compiled."""
        with (
            self.random_state.replayed(other=other_numbers),
            without_global_hooks(),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            # what the user's code warns of it has said in training
            warnings.simplefilter("ignore")
            yield fresh_copy(self.model, self.copier)

    def loss(self, replica: nn.Module, batch: Any) -> Tensor:
        """Compute the loss.

        Raises:
            CannotLookError: If there is none that can be differentiated.
        """
        loss = self.loss_fn(replica, clone_batch(batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise CannotLookError("the model gave no loss to differentiate")
        originals = {id(p) for p in self.model.parameters()}
        if any(id(getattr(node, "variable", None)) in originals for node in nodes_behind(loss)):
            raise CannotLookError("a copy of the model computes with the weights of the original")
        return loss.reshape(())


@dataclass
class Observation:
    """What a pass did with some of the examples.

    Attributes:
        inputs: What went into each layer, by call, shape (kept, ...).
        outputs: What came out.
        grads: The gradient of the loss by that.
        finite: Whether the loss was.
    """

    inputs: Rows = field(default_factory=dict)
    outputs: Rows = field(default_factory=dict)
    grads: Rows = field(default_factory=dict)
    finite: bool = False

    def some(self, rows: Tensor) -> Observation:
        """Return it for some of its examples."""
        inputs, outputs, grads = (
            {key: tensor[rows.to(tensor.device)] for key, tensor in part.items()}
            for part in (self.inputs, self.outputs, self.grads)
        )
        return Observation(inputs, outputs, grads, self.finite)

    def without(self, calls: set[tuple[str, int]]) -> Observation:
        """Return it without some calls of layers."""
        inputs, outputs, grads = (
            {key: tensor for key, tensor in part.items() if key[:2] not in calls}
            for part in (self.inputs, self.outputs, self.grads)
        )
        return Observation(inputs, outputs, grads, self.finite)


class Layers:
    """Hooks on all layers of a copy that have parameters.

    Args:
        replica: The copy.
        batch_size: B.
        dims: As in :class:`Subject`.
        shared: Calls whose results do not depend on the batch; their tensors have no rows.
        swap: Puts other rows into what layers give; None leaves it.
        see_input: Called with each tensor that goes into a layer and has rows, and where these are.
        see_output: The same with what comes out.
    """

    def __init__(
        self, replica: nn.Module, batch_size: int, dims: Mapping[str, BatchDim | None], shared: set[tuple[str, int]], *,
        swap: Swap | None, see_input: Callable[[Key, Tensor, BatchDim], None],
        see_output: Callable[[Key, Tensor, BatchDim], None],
    ) -> None:  # fmt: skip
        self._batch_size = batch_size
        self._dims = dims
        self._shared = shared
        self._swap = swap
        self._see_input = see_input
        self._see_output = see_output
        self._calls: dict[str, int] = {}
        self._open: dict[str, list[int]] = {}
        for name, module in replica.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            call = self._calls[name] = self._calls.get(name, -1) + 1
            self._open.setdefault(name, []).append(call)
            leaves = _tensors((args, kwargs))
            for place, dim in enumerate(self._input_dims(name, module, (args, kwargs), leaves)):
                if dim is not None and self._is_by_row(name, call, leaves[place], dim):
                    self._see_input((name, call, place), leaves[place], dim)

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            call = self._open[name].pop()
            tensors = _tensors(output)
            dims = self._output_dims(name, module, output, tensors)
            places = iter(range(len(tensors)))

            def take(leaf: Any) -> Any:
                if not isinstance(leaf, Tensor):
                    return leaf
                place = next(places)
                dim = dims[place]
                if dim is None or not self._is_by_row(name, call, leaf, dim):
                    return leaf
                self._see_output((name, call, place), leaf, dim)
                # a copy goes on, since what comes next may change it in place
                return leaf.clone() if self._swap is None else self._swap.apply(leaf, dim)

            return pytree.tree_map(take, output, is_leaf=_is_packed)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True, prepend=True)

    def _is_by_row(self, name: str, call: int, tensor: Tensor, dim: BatchDim) -> bool:
        return (name, call) not in self._shared and has_rows(tensor, dim, self._batch_size)

    def _input_dims(self, name: str, module: nn.Module, args: Any, leaves: list[Tensor]) -> list[BatchDim | None]:
        if has_own_axes(module):
            return [] if _holds_packed(args) else list(input_axes(module, args, leaves, self._batch_size, 0))
        return [self._dims.get(name, 0)] * len(leaves)

    def _output_dims(self, name: str, module: nn.Module, output: Any, leaves: list[Tensor]) -> list[BatchDim | None]:
        if has_own_axes(module):
            if _holds_packed(output):
                return [None] * len(leaves)
            return list(output_axes(module, leaves, self._batch_size, 0))
        return [self._dims.get(name, 0)] * len(leaves)


def observe(
    subject: Subject,
    kept: Tensor,
    *,
    shared: set[tuple[str, int]] | None = None,
    swap: Swap | None = None,
    batch: Any = None,
    batch_size: int | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
    other_numbers: bool = False,
) -> Observation:
    """Run one pass and keep the rows of the examples ``kept``.

    Args:
        subject: What is looked at.
        kept: Rows to keep, by index.
        shared: As in :class:`Layers`.
        swap: As in :class:`Layers`.
        batch: In the place of the subject's.
        batch_size: In the place of the subject's.
        prepare: Changes the copy before it runs.
        other_numbers: Whether to draw other random numbers.

    Raises:
        CannotLookError: If there is no loss.
    """
    found = Observation()
    count = batch_size or subject.batch_size

    def rows(tensor: Tensor, dim: BatchDim) -> Tensor:
        return by_example(tensor.detach(), dim, count)[kept.to(tensor.device)]

    def see_input(key: Key, tensor: Tensor, dim: BatchDim) -> None:
        if torch._C._current_graph_task_id() == -1:  # otherwise a recomputation
            found.inputs[key] = rows(tensor, dim)

    def see_output(key: Key, tensor: Tensor, dim: BatchDim) -> None:
        if torch._C._current_graph_task_id() == -1:
            found.outputs[key] = rows(tensor, dim)
        if tensor.grad_fn is None:
            return

        def see_grad(grad: Tensor) -> None:
            own = rows(grad, dim)
            found.grads[key] = found.grads[key] + own if key in found.grads else own

        tensor.register_hook(see_grad)  # type: ignore[no-untyped-call]  # torch's

    with subject.replica(other_numbers=other_numbers) as replica:
        if prepare is not None:
            prepare(replica)
        Layers(
            replica, count, subject.dims, shared or set(), swap=swap, see_input=see_input, see_output=see_output
        )  # fmt: skip
        loss = subject.loss(replica, subject.batch if batch is None else batch)
        found.finite = bool(torch.isfinite(loss.detach()))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
    return found


def nodes_behind(loss: Tensor) -> set[Node]:
    """Return all nodes of the graph that made a tensor."""
    seen: set[Node] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree, is_leaf=_is_packed) if isinstance(leaf, Tensor)]


def _holds_packed(tree: Any) -> bool:
    return any(_is_packed(leaf) for leaf in pytree.tree_leaves(tree, is_leaf=_is_packed))


def _is_packed(node: Any) -> bool:
    # its rows are of time steps, and sorted by length
    return isinstance(node, PackedSequence)
