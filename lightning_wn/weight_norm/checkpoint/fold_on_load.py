"""Read the checkpoint of a weight-normalized model into plain layers, whoever normalized it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_wn.weight_norm.checkpoint.keys import find_weight
from lightning_wn.weight_norm.core.layers import rule_for
from lightning_wn.weight_norm.core.mean_only_batch_norm import fold_mean_of_state
from lightning_wn.weight_norm.core.normalized_module import has_plain_weight, plain_weight
from lightning_wn.weight_norm.core.selection import NamedLayer


def fold_on_load(layers: Iterable[NamedLayer]) -> list[RemovableHandle]:
    """Let plain layers load a state dict in which their weight is spelled as g and v, by us or by torch.

    Args:
        layers: Layers of supported types.

    Returns:
        The handles of the hooks, one a layer, by which to end it.
    """
    return [
        layer.module.register_load_state_dict_pre_hook(_fold_state)  # type: ignore[no-untyped-call] # in torch
        for layer in layers
    ]


def _fold_state(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    rule = rule_for(module)
    for name in rule.tensors(module) if rule is not None else ():
        stored = find_weight(state_dict, prefix, name)
        if stored is None or len(stored.values) == 1 or not has_plain_weight(module, name):
            continue
        if stored.shape == plain_weight(module, name).shape:
            weight = stored.weight()
            for key in stored.keys:
                del state_dict[key]
            state_dict[f"{prefix}{name}"] = weight
    fold_mean_of_state(module, state_dict, prefix)
