"""Parameters that all examples share until they meet the batch: class tokens, position embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

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

    def watch(self, loss: Tensor, batch_size: int, calls: Sequence[Call], layers: Sequence[Layer]) -> None:
        """Find where they meet the batch and wait there; of a layer's result its call knows by ``shared``.

        Raises:
            PerExampleError: If such a result is not only added to the batch.
        """
        bare = _bare_parameters(calls, layers)
        candidates = [call for call in calls if call.layer.rule is not None and _may_be_shared(call, batch_size)]
        if not bare and not candidates:
            return
        self._tensors = tensors = SharedTensors(loss, batch_size)
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
        for parameters in bare:
            nodes = {id(p): (accumulation_node(p), p.shape) for p in parameters}
            found = {
                key: tensors.collect(node, 0, shape) for key, (node, shape) in nodes.items() if tensors.is_used(node)
            }
            # with one parameter that needs the module run again, all are found that way, with all its checks
            if all(shared is not None for shared in found.values()):
                self.gradients |= {key: shared for key, shared in found.items() if shared is not None}

    def remove(self) -> None:
        """Stop waiting."""
        if self._tensors is not None:
            self._tensors.remove()


def _bare_parameters(calls: Sequence[Call], layers: Sequence[Layer]) -> list[list[nn.Parameter]]:
    """List the parameters of modules without a rule, where no layer with a rule answers for them too."""
    ruled = {id(p) for layer in layers if layer.rule is not None for p in layer.parameters.values()}
    called = {id(call.layer): call.layer for call in calls if call.layer.rule is None}
    # modules that are known to turn their tensors around inside are run again
    groups = [list(layer.parameters.values()) for layer in called.values() if not has_own_axes(layer.module)]
    return [group for group in groups if not any(id(p) in ruled for p in group)]


def _may_be_shared(call: Call, batch_size: int) -> bool:
    """Whether the output may have no batch dimension; one of T == B positions looks like a batch."""
    dim = call.layer.axis
    shape = call.outputs[0].shape
    return not call.input_has_history or len(shape) <= dim or shape[dim] != batch_size
