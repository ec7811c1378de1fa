"""Weights that are computed once, for as long as a scope says that they stand still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_wn.weight_norm.core.normalized_module import is_sharded, normalized_weights


@dataclass
class _Slot:
    """What is kept for one layer while a scope is open."""

    module: nn.Module  # held so that its id is not used again
    depth: int = 0  # how many scopes are open
    weights: dict[str, Tensor] = field(default_factory=dict)  # by the name of the tensor


# by id and outside the modules, so that a copy of a module made inside a scope is no part of the scope
_slots: dict[int, _Slot] = {}


@contextmanager
def cached_weight_norm(module: nn.Module) -> Iterator[None]:
    """Compute each normalized weight of a model once, at its first use, for the length of a ``with`` block.

    A weight-normalized layer computes its weight whenever it is called, which costs small batches dearly.
    Inside this scope g and v stand still, so one computation is enough, and evaluation runs as fast as that
    of a plain model. It takes the memory of one copy of the normalized weights.

    - Only what is computed without gradients is kept. Where gradients are enabled, the weight is computed at
      every use, as outside.
    - ``load_state_dict``, ``.to()`` and assigning a weight are seen. A change of g or v in place, such as an
      optimizer's step or ``g.data.copy_()``, is not: it belongs outside the scope.
    - Scopes may be nested, and end when an exception passes. A deep copy made inside is not in the scope.
    - Under ``torch.compile`` the weights are computed within the compiled graph.
    - Parameters sharded by FSDP2 are not kept: the copy would hold the whole model on every rank.

    Args:
        module: The model, or a single layer. Layers that are not weight-normalized by this package are not
            touched.

    Example:
        >>> from lightning_wn import apply_weight_norm
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> names = apply_weight_norm(model)
        >>> with torch.no_grad(), cached_weight_norm(model):
        ...     model[0].weight is model[0].weight
        True
        >>> with torch.no_grad():
        ...     model[0].weight is model[0].weight
        False
    """
    opened = open_scope(module)
    try:
        yield
    finally:
        close_scope(opened)


def open_scope(module: nn.Module) -> list[nn.Module]:
    """Begin to keep the weights of these layers; return the layers, for :func:`close_scope`."""
    layers = []
    for layer in module.modules():
        weights = normalized_weights(layer).values()
        if weights and not any(map(is_sharded, weights)):
            _slots.setdefault(id(layer), _Slot(layer)).depth += 1
            layers.append(layer)
    return layers


def close_scope(layers: list[nn.Module]) -> None:
    """End what :func:`open_scope` began."""
    for layer in layers:
        if (slot := _slots.get(id(layer))) is not None:
            slot.depth -= 1
            if slot.depth == 0:
                del _slots[id(layer)]


def kept(module: nn.Module) -> dict[str, Tensor] | None:
    """Return the kept weights of a layer by name, to read and to write; None where nothing may be kept now."""
    if not _slots or torch.is_grad_enabled():
        return None
    slot = _slots.get(id(module))
    return slot.weights if slot is not None else None


def forget(module: nn.Module) -> None:
    """Drop what is kept of a layer, because its g and v change."""
    if (slot := _slots.get(id(module))) is not None:
        slot.weights.clear()


@contextmanager
def set_aside(module: nn.Module) -> Iterator[None]:
    """Keep no weights of a layer inside this block, which computes with other g and v; those kept before stay."""
    slot = _slots.pop(id(module), None)
    try:
        yield
    finally:
        if slot is not None:
            _slots[id(module)] = slot
