"""LSTM, GRU and RNN: let them compute with normalized weights.

torch's recurrent layers do not read their weights by name when they are called: they keep them in a list,
``_flat_weights``, which is only renewed where a weight has become another object. A computed weight is another
object at each reading, so that torch would compute each of them several times a call, keep the last ones with
their graph, and could no longer be copied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_wn.weight_norm.core.normalized_module import plain_class

# the weights of the calls that are running, by the module's id: one computation serves the whole call
_of_running_call: dict[int, list[Tensor | None]] = {}


def follow_weights(module: nn.RNNBase) -> None:
    """Let a recurrent layer of a class of its own compute its weights once a call, from what they are made of.

    Args:
        module: A parametrized layer: its class belongs to it and its copies.
    """
    follow_in_class(type(module))
    module.__dict__.pop("_flat_weights", None)
    module._flat_weight_refs = []


def follow_in_class(cls: Any) -> None:
    """Do what :func:`follow_weights` does to the class of a layer."""
    if isinstance(vars(cls).get("_flat_weights"), property):
        return
    # what torch would keep in the list is not kept
    cls._flat_weights = property(_flat_weights, lambda module, weights: None)
    cls.forward = _forward
    # what keeps torch's list up to date, and what packs it for cuDNN: there is none
    cls._init_flat_weights = cls._update_flat_weights = cls.flatten_parameters = lambda module: None


def restore_weights(module: nn.RNNBase) -> None:
    """Give a layer that is plain again its list back."""
    if not isinstance(vars(type(module)).get("_flat_weights"), property):
        module._init_flat_weights()


def _forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
    outer = _of_running_call.get(id(self))
    _of_running_call[id(self)] = _read(self)
    try:
        return plain_class(self).forward(self, *args, **kwargs)
    finally:
        if outer is None:
            del _of_running_call[id(self)]
        else:
            _of_running_call[id(self)] = outer


def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    running = _of_running_call.get(id(self))
    return _read(self) if running is None else running


def _read(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]
