"""Read the checkpoint of a weight-normalized model into plain layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_wn.weight_norm.layers import rule_for
from lightning_wn.weight_norm.mean_only_batch_norm import fold_mean_of_state
from lightning_wn.weight_norm.parametrization import UnitLayout, compose, unit_norm
from lightning_wn.weight_norm.reparametrization import has_plain_weight, plain_weight
from lightning_wn.weight_norm.selection import NamedLayer


def fold_on_load(layers: Iterable[NamedLayer]) -> list[RemovableHandle]:
    """Let plain layers load a state dict in which their weight is spelled as g and v.

    Args:
        layers: Layers of supported types.

    Returns:
        The handles of the hooks, one a layer, by which to end it.

    Example:
        >>> from lightning_wn.weight_norm import apply_weight_norm
        >>> trained, plain = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> _ = apply_weight_norm(trained)
        >>> _ = fold_on_load([NamedLayer(("",), plain)])
        >>> plain.load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """
    return [
        layer.module.register_load_state_dict_pre_hook(_fold_state)  # type: ignore[no-untyped-call] # in torch
        for layer in layers
    ]


def _fold_state(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    rule = rule_for(module)
    for tensor in rule.tensors(module) if rule is not None else ():
        keys = [f"{prefix}parametrizations.{tensor}.original{i}" for i in range(2)]
        if rule is None or not has_plain_weight(module, tensor) or any(key not in state_dict for key in keys):
            continue
        g, v = (state_dict[key] for key in keys)
        # anything else, such as the norm over another dimension, is left to the strict check of names
        for layout in (rule.layout(module), UnitLayout(per_tensor=True)):
            fits = v.shape == plain_weight(module, tensor).shape and g.shape == layout.gain(unit_norm(v, layout)).shape
            if fits and keys[0] in state_dict:
                state_dict[f"{prefix}{tensor}"] = compose(g, v, layout)
                for key in keys:
                    del state_dict[key]
                fold_mean_of_state(module, state_dict, prefix)
