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
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_wn.per_example.engine.batch_axes import output_axes
from lightning_wn.per_example.engine.call import Call
from lightning_wn.per_example.rules.errors import PerExampleError, reached_twice
from lightning_wn.per_example.rules.registry import is_measured_as_one
from lightning_wn.weight_norm.core.forward import call_forward

Gradients = dict[str, Tensor]
"""Per-example gradients by parameter name, each (B, *parameter)."""


class _DrawsNumbers(Exception):  # noqa: N818  # control flow, never seen by users
    """The module draws random numbers: examples cannot be run alone."""


class Rerun:
    """One call of a module, ready to be run again.

    Args:
        call: The call.
        parameters: The parameters to differentiate by, by their names in the module.
        batch_size: B.

    Raises:
        PerExampleError: If that would not be what autograd saw.
    """

    def __init__(self, call: Call, parameters: Mapping[str, nn.Parameter], batch_size: int) -> None:
        layer = call.layer
        if any(output.arrivals > 1 for output in call.outputs):
            raise reached_twice(layer.label)
        call.require_intact()
        if any(isinstance(arg, PackedSequence) for arg in pytree.tree_unflatten(call.leaves, call.spec)[0]):
            raise PerExampleError(
                f"{layer.label} got a packed sequence, in which the examples lie interleaved: give it the padded tensor"
            )
        if layer.batch_dim == "folded":
            raise PerExampleError(f"{layer.label} has no rule, and without one 'folded' is not possible: register one")
        self._layer = layer
        self._call = call
        self._parameters = {name: p.detach() for name, p in parameters.items()}
        self._batch_size = batch_size
        self._input_axes = call.axes(batch_size)
        self._grads = [output.grad for output in call.outputs]
        shapes = [torch.empty(output.shape, device="meta") for output in call.outputs]
        self._output_axes = output_axes(layer.module, shapes, batch_size, layer.axis)
        if any(grad is not None and axis is None for grad, axis in self._pairs()):
            raise PerExampleError(
                f"an output of {layer.label} has a gradient but no batch dimension: leave its parameters out of the "
                "measured ones, or register a rule for the module's class"
            )

    def gradients(self) -> Gradients:
        """Return the per-example gradients by the first way that works, which the layer remembers.

        Raises:
            PerExampleError: If the module cannot be run example by example.
        """
        layer, training = self._layer, self._layer.module.training
        known = layer.ways.get(training)
        if all(axis is None for axis in self._input_axes) and known is None:
            raise PerExampleError(
                f"no argument of {layer.label} has the batch of {self._batch_size} in its first dimension: name the "
                "dimension in `batch_dims`, or register a rule for the module's class"
            )
        ways = (self.vectorised, self.looped, self.masked)
        for index in range(len(ways)) if known is None else (known,):
            try:
                gradients = ways[index]()
            except (_DrawsNumbers, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as raised:
                error: Exception = raised
                continue
            layer.ways[training] = index
            return gradients
        raise PerExampleError(
            f"{layer.label} has parameters of its own, no rule, and cannot be run example by example "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): register a rule "
            "for its class, or leave its parameters out of the measured ones"
        ) from error

    def _run(self, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        new = iter(tensors)
        leaves = [next(new) if isinstance(leaf, Tensor) else leaf for leaf in self._call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._call.spec)
        # the module may update its buffers, but not twice a step
        buffers = {name: buffer.clone() for name, buffer in self._layer.module.named_buffers()}
        module = self._layer.module
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        # what a child holds too is the child's to answer for; the module's own names all get the new tensor
        names = {id(own[name]): name for name in parameters if name in own}
        parameters = {**parameters, **{key: parameters[names[id(p)]] for key, p in own.items() if id(p) in names}}
        output = call_forward(module, {**parameters, **buffers}, args, kwargs, tied=is_measured_as_one(module))
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

    def _pairs(self) -> Iterator[tuple[Tensor | None, int | None]]:
        return zip(self._grads, self._output_axes, strict=True)

    def _state(self) -> AbstractContextManager[Callable[[], bool]]:
        assert self._call.context is not None
        return self._call.context.restored()

    def _objective(
        self, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Tensor:
        """<output, gradient> of one example: its gradient by the parameters is the example's."""
        batched = [t if axis is None else t.unsqueeze(axis) for t, axis in zip(tensors, self._input_axes, strict=True)]
        outputs = self._run(parameters, batched)
        total = torch.zeros((), device=outputs[0].device)
        for output, grad, axis in zip(outputs, grads, self._output_axes, strict=True):
            if grad is not None and axis is not None:
                # of complex outputs, torch's gradient G stands for the change Re<conj(G), output>
                product = (output * grad.unsqueeze(axis).conj()).sum()
                total = total + (product.real if product.is_complex() else product)
        return total

    def vectorised(self) -> Gradients:
        """Way 1."""
        axes = (None, list(self._input_axes), [None if g is None else a for g, a in self._pairs()])
        gradient = torch.func.vmap(torch.func.grad(self._objective), in_dims=axes, randomness="error")
        with self._state():
            result: Gradients = gradient(self._parameters, self._call.tensors, list(self._grads))
        return result

    def looped(self) -> Gradients:
        """Way 2."""
        gradient = torch.func.grad(self._objective)
        rows: list[Gradients] = []
        with self._state() as drawn:
            for i in range(self._batch_size):
                pairs = zip(self._call.tensors, self._input_axes, strict=True)
                tensors = [t if axis is None else t.select(axis, i) for t, axis in pairs]
                grads = [g if g is None or a is None else g.select(a, i) for g, a in self._pairs()]
                rows.append(gradient(self._parameters, tensors, grads))
                if drawn():
                    raise _DrawsNumbers
        return {name: torch.stack([row[name] for row in rows]) for name in self._parameters}

    def masked(self) -> Gradients:
        """Way 3."""
        with self._state(), torch.enable_grad():
            free = {name: p.detach().requires_grad_() for name, p in self._parameters.items()}
            differentiable = [t.is_floating_point() or t.is_complex() for t in self._call.tensors]
            pairs = zip(self._call.tensors, differentiable, strict=True)
            tensors = [t.detach().requires_grad_(requires) for t, requires in pairs]
            # operations in place on a leaf that requires a gradient are forbidden
            outputs = self._run(free, [t.view_as(t) for t in tensors])
        used = [(o, g, a) for o, (g, a) in zip(outputs, self._pairs(), strict=True) if g is not None]
        inputs = [(t, a) for t, a in zip(tensors, self._input_axes, strict=True) if t.requires_grad]
        parameters = list(free.values())
        rows: list[list[Tensor]] = []
        leaked = torch.zeros((), device=outputs[0].device)
        for i in range(self._batch_size):
            seeds = [_only(g, axis, i) for _, g, axis in used]
            gradients = torch.autograd.grad(
                [o for o, _, _ in used], [*parameters, *(t for t, _ in inputs)], seeds,
                retain_graph=i + 1 < self._batch_size, allow_unused=True,
            )  # fmt: skip
            own, by_input = gradients[: len(parameters)], gradients[len(parameters) :]
            rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, own, strict=True)])
            for grad, (_, axis) in zip(by_input, inputs, strict=True):
                if grad is not None and axis is not None:
                    leaked = leaked + (grad - _only(grad, axis, i)).abs().sum()
        # an example that moves another's input is no example: NaN, so that the step cannot be used
        stacked = zip(free, map(torch.stack, zip(*rows, strict=True)), strict=True)
        return {name: torch.where(leaked > 0, torch.nan, grad) for name, grad in stacked}


def _only(tensor: Tensor, axis: int | None, index: int) -> Tensor:
    """Keep one example, zero elsewhere."""
    if axis is None:
        return tensor
    kept = torch.zeros_like(tensor)
    kept.select(axis, index).copy_(tensor.select(axis, index))
    return kept
