"""One call of a layer in a measured forward pass: what went in, and the gradients of what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from lightning_wn.per_example.engine.batch_axes import Axes, input_axes
from lightning_wn.per_example.engine.layers import Layer
from lightning_wn.per_example.engine.shared_tensors import SharedGradient
from lightning_wn.per_example.rules.errors import PerExampleError, shape_of
from lightning_wn.per_example.rules.registry import Seen


@dataclass
class Context:
    """What decides what a forward pass computes, beside its arguments: random state and autocast."""

    cpu_state: Tensor
    device_states: list[tuple[torch.device, Tensor]]
    device_type: str
    autocast: tuple[bool, torch.dtype]

    @classmethod
    def capture(cls, devices: Sequence[torch.device]) -> Context:
        """Note the state in which a module is about to run; copies a few kilobytes, waits for no device."""
        accelerators = [device for device in devices if device.type == "cuda"]
        kind = accelerators[0].type if accelerators else "cpu"
        return cls(
            torch.get_rng_state(),
            [(device, torch.cuda.get_rng_state(device)) for device in accelerators],
            kind,
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        )

    @contextmanager
    def restored(self) -> Iterator[Callable[[], bool]]:
        """Run in the noted state and put today's back; yields whether random numbers were drawn so far."""

        def drawn() -> bool:
            now = Context.capture([device for device, _ in self.device_states])
            same = torch.equal(now.cpu_state, self.cpu_state) and all(
                torch.equal(a, b) for (_, a), (_, b) in zip(now.device_states, self.device_states, strict=True)
            )
            return not same

        with torch.random.fork_rng([device for device, _ in self.device_states]):
            torch.set_rng_state(self.cpu_state)
            for device, state in self.device_states:
                torch.cuda.set_rng_state(state, device)
            enabled, dtype = self.autocast
            with torch.autocast(self.device_type, dtype=dtype, enabled=enabled, cache_enabled=False):
                yield drawn


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Attributes:
        layer: The layer.
        leaves: Its arguments ``(args, kwargs)``, flattened.
        spec: How to unflatten them.
        versions: How often each tensor among them had been changed in place when the layer got it.
        outputs: The tensors that came out.
        context: Random state and autocast at the call, for layers without a rule.
        input_has_history: Whether the input came out of other operations of the graph.
        shared: Where the result meets the batch, if all examples share it.
        without: Parameters, by identity, that the module holds and leaves to a child to use.
    """

    layer: Layer
    leaves: list[Any]
    spec: Any
    versions: list[int]
    outputs: list[OutputGradient]
    context: Context | None
    input_has_history: bool
    shared: SharedGradient | None = None
    without: set[int] = field(default_factory=set)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def leave_to_children(self) -> None:
        """Expect no gradient of the parameters that the module holds ``without`` using them."""
        for name, parameter in self.layer.parameters.items():
            if id(parameter) in self.without and name in self.layer.slots:
                self.layer.slots[name].calls -= 1

    def require_intact(self) -> None:
        """Raise if an argument is no longer what the layer got.

        Raises:
            PerExampleError: If one was changed in place.
        """
        if [t._version for t in self.tensors] != self.versions:
            raise PerExampleError(
                f"the input of {self.layer.label} was changed in place after the layer had used it: write x = x + y "
                "for x += y there"
            )

    def require_seen(self) -> None:
        """Raise if a gradient may have taken a way past the hooks.

        Raises:
            PerExampleError: If an output is a view that was changed in place.
        """
        if any(output.may_be_missed() for output in self.outputs):
            raise PerExampleError(
                f"the output of {self.layer.label} is a view that was changed in place: write the change out of place, "
                "or register a rule for the module's class"
            )

    def arrived_gradient(self) -> Tensor:
        """Return the gradient by the output, or by every example's share of it where all examples share one."""
        grad = self.outputs[0].grad if self.shared is None else self.shared.grad
        assert grad is not None
        self.require_intact()
        return grad

    def seen(self, grad: Tensor, batch_size: int) -> tuple[Seen, int]:
        """Bring input and output gradient into the form that rules take; also how many parts an example has."""
        layer, x, fold = self.layer, self.tensors[0], 1
        needed = frozenset(layer.slots)
        if self.shared is not None:
            return Seen(_wide(x, grad).expand(batch_size, *x.shape), grad, needed), fold
        if layer.batch_dim == "folded":
            fold, rest = divmod(grad.shape[0], batch_size)
            if rest or x.shape[0] != grad.shape[0]:
                raise PerExampleError(
                    f"{layer.label} is said to be folded, but the first dimension of its input ({shape_of(x)}) is no "
                    f"multiple of the batch of {batch_size}: name it in `batch_dims` differently"
                )
        else:
            dim = layer.batch_dim
            if batch_size == 1 and (grad.ndim <= dim or grad.shape[dim] != 1):
                # what a single example does not share with others belongs to it all the same
                x, grad, dim = x.unsqueeze(0), grad.unsqueeze(0), 0
            if not all(t.ndim > dim and t.shape[dim] == batch_size for t in (x, grad)):
                raise PerExampleError(
                    f"{layer.label} got an input of shape {shape_of(x)}, whose dimension {dim} is not the batch of "
                    f"{batch_size}: name the dimension in `batch_dims`, or 'folded' if the parts of an example lie one "
                    "after the other in the first one"
                )
            if layer.maybe_sequence_first and grad.ndim > 2 and grad.shape[1] == batch_size:
                raise PerExampleError(
                    f"{layer.label} got an input of shape {shape_of(x)}: two dimensions may be the batch, "
                    "since the model has modules with batch_first=False: name the dimension in `batch_dims`"
                )
            x, grad = x.movedim(dim, 0), grad.movedim(dim, 0)
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return Seen(_wide(x, grad), wide, needed), fold

    def axes(self, batch_size: int) -> Axes:
        """Return the batch dimension of each tensor among the arguments, None for what all examples share."""
        arguments = pytree.tree_unflatten(self.leaves, self.spec)
        return input_axes(self.layer.module, arguments, self.tensors, batch_size, self.layer.axis)


def start_of(layer: Layer, args: Any, kwargs: Any) -> tuple[list[int], Context]:
    """Note how often each tensor among a call's arguments had been changed in place, and what else decides."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return [t._version for t in leaves], Context.capture(list({p.device for p in layer.parameters.values()}))


def _wide(x: Tensor, grad: Tensor) -> Tensor:
    """Return a layer's input in float32 at least."""
    if not x.is_floating_point():
        return x
    # matrix products under autocast saw the input rounded to the type of their output
    x = x.to(grad.dtype) if grad.dtype.itemsize < x.dtype.itemsize else x
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_private(output: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether the output shares no memory with what went in."""
    storage = output.untyped_storage()._cdata
    return all(t.untyped_storage()._cdata != storage for t in inputs)


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
        self.ignored = False
        self._arrived = arrived
        self._watched: tuple[Tensor, int] | None = None
        self._handle: Any = None
        self.node: Node | None = output.grad_fn
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
        if grad is None or self.ignored:
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
    return bool(
        view.numel() == base.numel()
        and view.dtype == base.dtype
        and view.is_contiguous()
        and base.is_contiguous()
        and view.storage_offset() == base.storage_offset()
    )


def accumulation_node(parameter: Tensor) -> Node:
    """Return the node that adds into a parameter's ``.grad``."""
    return torch.autograd.graph.get_gradient_edge(parameter).node
