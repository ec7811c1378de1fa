"""Parameters that all examples share until they meet the batch: class tokens, position embeddings."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_wn.per_example.engine.batch_axes import has_own_axes
from lightning_wn.per_example.engine.call import Call, accumulation_node
from lightning_wn.per_example.engine.layers import Layer
from lightning_wn.per_example.engine.shared_tensors import SharedGradient, SharedTensors
from lightning_wn.per_example.rules.errors import PerExampleError


class SharedParameters:
    """Follows them in the graph of one loss, and the results of layers that have no batch dimension.

    Attributes:
        gradients: Of the parameters of modules without a rule, by identity, what is collected of them.
    """

    def __init__(self) -> None:
        self.gradients: dict[int, SharedGradient] = {}
        self._tensors: SharedTensors | None = None

    def watch(
        self, loss: Tensor, batch_size: int, calls: Sequence[Call], layers: Sequence[Layer], apart: Collection[Node]
    ) -> None:
        """Find where they meet the batch and wait there; of a layer's result its call knows by ``shared``.

        Args:
            loss: The tensor that is about to be back-propagated.
            batch_size: B.
            calls: Of layers, in this forward pass.
            layers: All.
            apart: Nodes of the loss that are followed elsewhere.

        Raises:
            PerExampleError: If such a result is not only added to the batch, or a parameter that no layer's forward
                uses meets it in a way that cannot be followed.
        """
        bare, tied = _bare_parameters(calls, layers), _tied(calls, layers)
        outside = _uncalled_parameters(calls, layers)
        candidates = [call for call in calls if call.layer.rule is not None and _may_be_shared(call, batch_size)]
        several = [call for call in calls if call.layer.rule is None and len(call.outputs) > 1]
        if not bare and not candidates and not outside and not tied and not several:
            return
        self._tensors = tensors = SharedTensors(loss, batch_size, apart)
        for call in several:
            _keep_outer_gradients(call, tensors)
        for call in candidates:
            output = call.outputs[0]
            node, index = output.edge
            if node is not None and tensors.meets_batch(node, index, output.shape):
                call.shared = tensors.collect(node, index, output.shape)
                if call.shared is None:
                    raise PerExampleError(
                        f"all examples share the result of {call.layer.label} and it is not only added to the batch: "
                        "expand it to the batch first, or leave its parameters out of the measured ones"
                    )
        for name, parameters, last in bare:
            used = {key: p for key, p in parameters.items() if tensors.is_used(accumulation_node(p))}
            past = {key: p for key, p in used.items() if tensors.is_used_after(accumulation_node(p), last)}
            outside += [(f"{name}.{key}" if name else key, p) for key, p in past.items()]
            # what happens to the examples behind a product shows only where the module is run again
            found = {id(p): self._collect(p, inside=True) for key, p in used.items() if key not in past}
            # with one parameter that needs the module run again, all are found that way, with all its checks
            if all(shared is not None for shared in found.values()):
                self.gradients |= {key: shared for key, shared in found.items() if shared is not None}
        for name, parameter in outside:
            if tensors.is_used(accumulation_node(parameter)) and id(parameter) not in self.gradients:
                shared = self._collect(parameter)
                if shared is None:
                    raise PerExampleError(
                        f"parameter {name!r} enters the loss past every module's forward, and not by an operation that "
                        "keeps the examples apart (elementwise or as a matrix that the batch is multiplied by): move "
                        "its use into the forward of a module of its own"
                    )
                self.gradients[id(parameter)] = shared
        for call, parameter, times in tied:
            # each call of the child uses it once; is there more?
            if 0 < tensors.uses(accumulation_node(parameter)) <= times:
                call.without.add(id(parameter))

    def _collect(self, parameter: nn.Parameter, *, inside: bool = False) -> SharedGradient | None:
        assert self._tensors is not None
        node = accumulation_node(parameter)
        return self._tensors.collect(node, 0, parameter.shape, elementwise=not inside, products=not inside)

    def remove(self) -> None:
        """Stop waiting."""
        if self._tensors is not None:
            self._tensors.remove()


def _keep_outer_gradients(call: Call, tensors: SharedTensors) -> None:
    """Tell what the rest of the model does with an output from what the module itself makes of it.

    A recurrent cell returns h and c, and h is made of c: the gradient that reaches c is of both.

    Raises:
        PerExampleError: If one is used in both ways.
    """
    nodes = [output.edge[0] for output in call.outputs]
    last = max((node._sequence_nr() for node in nodes if node is not None), default=0)
    for output, node in zip(call.outputs, nodes, strict=True):
        if node is None or not tensors.is_used(node) or has_own_axes(call.layer.module):
            continue
        if tensors.is_used_after(node, last):
            continue
        if tensors.is_used_before(node, last):
            output.ignored = True
            continue
        raise PerExampleError(
            f"{call.layer.label} uses one of its outputs itself, and the model uses it too (as the cell state of "
            "nn.LSTMCell over several steps), so that its gradient cannot be told apart: use the layer that runs over "
            "the sequence (nn.LSTM for nn.LSTMCell)"
        )


def _bare_parameters(calls: Sequence[Call], layers: Sequence[Layer]) -> list[tuple[str, dict[str, nn.Parameter], int]]:
    """List the parameters of modules without a rule, where no layer with a rule answers for them too.

    With them the module's name, and which operation of the graph was the last of its forward.
    """
    ruled = {id(p) for layer in layers if layer.rule is not None for p in layer.parameters.values()}
    last: dict[str, int] = {}
    called: dict[str, Layer] = {}
    for call in calls:
        # modules that are known to turn their tensors around inside are run again
        if call.layer.rule is None and not has_own_axes(call.layer.module):
            nodes = [output.edge[0] for output in call.outputs]
            ends = [node._sequence_nr() for node in nodes if node is not None]
            last[call.layer.name] = max([*ends, last.get(call.layer.name, 0)])
            called[call.layer.name] = call.layer
    return [
        (name, layer.parameters, last[name])
        for name, layer in called.items()
        if not any(id(p) in ruled for p in layer.parameters.values())
    ]


def _uncalled_parameters(calls: Sequence[Call], layers: Sequence[Layer]) -> list[tuple[str, nn.Parameter]]:
    """List the parameters of which no module was called: they may be used in a training step, or by another module."""
    called = {id(call.layer) for call in calls}
    answered = {id(p) for layer in layers if id(layer) in called or has_own_axes(layer.module)
                for p in layer.parameters.values()}  # fmt: skip
    return [
        (f"{layer.name}.{name}" if layer.name else name, parameter)
        for layer in layers
        for name, parameter in layer.parameters.items()
        if id(parameter) not in answered and all(slot.weight_norm is None for slot in layer.slots.values())
    ]


def _tied(calls: Sequence[Call], layers: Sequence[Layer]) -> list[tuple[Call, nn.Parameter, int]]:
    """List calls of modules without a rule whose parameter a layer with a rule has, too, and the calls of that."""
    times: dict[int, int] = {}
    for call in calls:
        if call.layer.rule is not None:
            for parameter in call.layer.parameters.values():
                times[id(parameter)] = times.get(id(parameter), 0) + 1
    return [
        (call, parameter, times[id(parameter)])
        for call in calls
        if call.layer.rule is None
        for parameter in call.layer.parameters.values()
        if id(parameter) in times
    ]


def _may_be_shared(call: Call, batch_size: int) -> bool:
    """Whether the output may have no batch dimension; one of T == B positions looks like a batch."""
    dim = call.layer.axis
    shape = call.outputs[0].shape
    return not call.input_has_history or len(shape) <= dim or shape[dim] != batch_size
