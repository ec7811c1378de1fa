"""Parameter groups for an optimizer of a weight-normalized model."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_wn.weight_norm.core.normalized_module import g_and_v, normalized_weights


def weight_norm_parameter_groups(
    module: nn.Module, weight_decay: float, *, decay_g: bool = False, decay_v: bool = False
) -> list[dict[str, Any]]:
    """Split trainable parameters into those with weight decay and those without: g and v.

    Decay of v does not regularize, since only its direction counts: it shrinks ‖v‖, and so raises the
    effective learning rate. Decay of g does regularize, as decay of the plain weight would.

    Args:
        module: The model; its frozen parameters are left out.
        weight_decay: For all parameters other than g and v.
        decay_g: Give g the same decay.
        decay_v: Give v the same decay.

    Returns:
        One or two groups for a torch optimizer, in the order of the model, each with its ``weight_decay``.

    Raises:
        ValueError: If ``weight_decay`` is negative.

    Example:
        >>> import torch
        >>> from lightning_wn import apply_weight_norm
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> names = apply_weight_norm(model)
        >>> groups = weight_norm_parameter_groups(model, 0.1, decay_g=True)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(4, 0.1), (1, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    if not weight_decay >= 0:
        raise ValueError(f"`weight_decay` must be a number of at least 0, got {weight_decay!r}.")
    parts = [g_and_v(normalized) for layer in module.modules() for normalized in normalized_weights(layer).values()]
    spared = {id(g) for g, _ in parts if not decay_g} | {id(v) for _, v in parts if not decay_v}
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
