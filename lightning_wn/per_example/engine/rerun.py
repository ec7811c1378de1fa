"""The rule for modules without a rule: run the module again, example by example.

Three ways, all exact; the first that works for a module is kept.

1. ``torch.func``: the gradient of each example's own forward pass, vectorised over the batch.
2. The same in a loop over examples, for operations that cannot be vectorised (GRU, LSTM).
3. Where the module draws random numbers (dropout) no example can be run alone, because its numbers depend on
   its place in the batch. The whole batch is run once from the saved random state, and pulled back once an
   example, with the output gradients of all others set to zero.

Which tensors hold the batch is inferred from their shapes. Nothing rests on that inference: the sum over examples
must be the gradient that autograd computes for the whole batch, which ways 1 and 2 fail when they sliced
wrongly or when the module mixes examples; way 3 checks the gradients by the inputs for mixing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_wn.per_example.engine.batch_axes import Axes
from lightning_wn.per_example.rules.errors import PerExampleError
from lightning_wn.weight_norm.core.forward import call_forward

Gradients = dict[str, Tensor]
"""Per-example gradients by parameter name, each (B, *parameter)."""


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


class _DrawsNumbers(Exception):  # noqa: N818  # control flow, never seen by users
    """The module draws random numbers: examples cannot be run alone."""


@dataclass
class Rerun:
    """One call of a module, ready to be run again.

    Attributes:
        module: The module.
        parameters: The parameters to differentiate by, by their names in the module.
        leaves: The call's arguments ``(args, kwargs)``, flattened.
        spec: How to unflatten them.
        places: Where the tensors are among the leaves.
        input_axes: The batch dimension of each of these tensors.
        grads: The gradient by each tensor of the output, None for one that got none.
        output_axes: The batch dimension of each of these.
        context: The state in which the module ran.
    """

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    leaves: list[Any]
    spec: Any
    places: list[int]
    input_axes: Axes
    grads: list[Tensor | None]
    output_axes: Axes
    context: Context

    def _call(self, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        # the module may update its buffers, but not twice a step
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        output = call_forward(self.module, {**parameters, **buffers}, args, kwargs)
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [self.leaves[place] for place in self.places]

    def _objective(
        self, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Tensor:
        """<output, gradient> of one example: its gradient by the parameters is the example's."""
        batched = [t if axis is None else t.unsqueeze(axis) for t, axis in zip(tensors, self.input_axes, strict=True)]
        outputs = self._call(parameters, batched)
        total = torch.zeros((), device=outputs[0].device)
        for output, grad, axis in zip(outputs, grads, self.output_axes, strict=True):
            if grad is not None and axis is not None:
                total = total + (output * grad.unsqueeze(axis)).sum()
        return total

    def vectorised(self, batch_size: int) -> Gradients:
        """Way 1."""
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        gradient = torch.func.grad(self._objective)
        axes = (None, list(self.input_axes), [None if g is None else a for g, a in self._pairs()])
        with self.context.restored():
            result: Gradients = torch.func.vmap(gradient, in_dims=axes, randomness="error")(
                parameters, [t.detach() for t in self.tensors], list(self.grads)
            )
        return result

    def _pairs(self) -> Iterator[tuple[Tensor | None, int | None]]:
        return zip(self.grads, self.output_axes, strict=True)

    def looped(self, batch_size: int) -> Gradients:
        """Way 2."""
        gradient = torch.func.grad(self._objective)
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        rows: list[Gradients] = []
        with self.context.restored() as drawn:
            for i in range(batch_size):
                tensors = [
                    t.detach() if axis is None else t.detach().select(axis, i)
                    for t, axis in zip(self.tensors, self.input_axes, strict=True)
                ]
                grads = [g if g is None or a is None else g.select(a, i) for g, a in self._pairs()]
                rows.append(gradient(parameters, tensors, grads))
                if drawn():
                    raise _DrawsNumbers
        return {name: torch.stack([row[name] for row in rows]) for name in parameters}

    def masked(self, batch_size: int) -> Gradients:
        """Way 3."""
        names = list(self.parameters)
        with self.context.restored(), torch.enable_grad():
            parameters = [p.detach().requires_grad_() for p in self.parameters.values()]
            tensors = [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in self.tensors]
            # operations in place on a leaf that requires a gradient are forbidden
            outputs = self._call(dict(zip(names, parameters, strict=True)), [t.view_as(t) for t in tensors])
        used = [(o, g, a) for o, (g, a) in zip(outputs, self._pairs(), strict=True) if g is not None]
        inputs = [(t, a) for t, a in zip(tensors, self.input_axes, strict=True) if t.requires_grad]
        rows: list[list[Tensor]] = []
        leaked = torch.zeros((), device=outputs[0].device)
        for i in range(batch_size):
            seeds = [_only(g, axis, i) for _, g, axis in used]
            gradients = torch.autograd.grad(
                [o for o, _, _ in used], [*parameters, *(t for t, _ in inputs)], seeds,
                retain_graph=i + 1 < batch_size, allow_unused=True,
            )  # fmt: skip
            rows.append(
                [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(parameters, gradients[: len(parameters)], strict=True)
                ]
            )
            for grad, (_, axis) in zip(gradients[len(parameters) :], inputs, strict=True):
                if grad is not None and axis is not None:
                    leaked = leaked + (grad - _only(grad, axis, i)).abs().sum()
        stacked = {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(names)}
        # an example that moves another's input is no example: NaN, so that the step cannot be used
        return {name: torch.where(leaked > 0, torch.nan, grad) for name, grad in stacked.items()}


def _only(tensor: Tensor, axis: int | None, index: int) -> Tensor:
    """Keep one example, zero elsewhere."""
    if axis is None:
        return tensor
    kept = torch.zeros_like(tensor)
    kept.select(axis, index).copy_(tensor.select(axis, index))
    return kept


_WAYS: tuple[Callable[[Rerun, int], Gradients], ...] = (Rerun.vectorised, Rerun.looped, Rerun.masked)


class GenericRule:
    """Finds per-example gradients by running the module again; remembers which way works for it."""

    def __init__(self) -> None:
        self._way: dict[bool, int] = {}

    def __call__(self, rerun: Rerun, batch_size: int, name: str) -> Gradients:
        """Return the per-example gradients of ``rerun.parameters``.

        Raises:
            PerExampleError: If the module cannot be run example by example.
        """
        training = rerun.module.training
        known = self._way.get(training)
        if all(axis is None for axis in rerun.input_axes) and known is None:
            raise PerExampleError(
                f"no argument of {name} has the batch of {batch_size} in its first dimension: name the dimension in "
                "`batch_dims`, or register a rule for the module's class"
            )
        errors: list[Exception] = []
        for index in range(len(_WAYS)) if known is None else (known,):
            try:
                gradients = _WAYS[index](rerun, batch_size)
            except (_DrawsNumbers, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                errors.append(error)
                continue
            self._way[training] = index
            return gradients
        raise PerExampleError(
            f"{name} has parameters of its own, no rule, and cannot be run example by example "
            f"({str(errors[-1]).splitlines()[0] if str(errors[-1]) else type(errors[-1]).__name__}): register a rule "
            "for its class, or leave its parameters out of the measured ones"
        ) from errors[-1]
