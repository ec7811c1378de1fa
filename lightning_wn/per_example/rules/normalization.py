"""Rules for normalization layers: the scale's gradient is Σ_t D_t · x̂_t, the shift's is Σ_t D_t.

Per-example gradients of these layers are small enough to be materialised (Gray et al. 2024, arXiv 2411.00999).
The normalized input x̂ is computed anew: the layer's output may have been overwritten by the next layer.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  # as torch's own documentation spells it
from torch import Tensor, nn

from lightning_wn.per_example.rules.errors import require_batch_dimension
from lightning_wn.per_example.rules.gradients import Dense, Form
from lightning_wn.per_example.rules.registry import Seen, register_per_example_rule

AnyInstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


@register_per_example_rule(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, seen: Seen) -> dict[str, Form]:
    """Scale and shift over the last dimensions."""
    return _trailing(seen, F.layer_norm(seen.input, module.normalized_shape, None, None, module.eps), module)


@register_per_example_rule(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm, seen: Seen) -> dict[str, Form]:
    """Scale over the last dimensions."""
    # without eps torch takes the machine epsilon of the input's own type; float32's is the same in float32
    return _trailing(seen, F.rms_norm(seen.input, module.normalized_shape, None, module.eps), module)


def _trailing(seen: Seen, normalized: Tensor, module: nn.LayerNorm | nn.RMSNorm) -> dict[str, Form]:
    require_batch_dimension(module, seen.grad, len(module.normalized_shape) + 1)
    return _affine(seen, normalized, tuple(range(1, seen.grad.ndim - len(module.normalized_shape))))


@register_per_example_rule(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, seen: Seen) -> dict[str, Form]:
    """Scale and shift per channel."""
    normalized = F.group_norm(seen.input, module.num_groups, None, None, module.eps)
    return _affine(seen, normalized, tuple(range(2, seen.grad.ndim)))


@register_per_example_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: AnyInstanceNorm, seen: Seen) -> dict[str, Form]:
    """Scale and shift per channel."""
    require_batch_dimension(module, seen.input, module._get_no_batch_dim() + 1)
    own_statistics = module.training or not module.track_running_stats
    mean, var = (None, None) if own_statistics else (module.running_mean, module.running_var)
    if mean is not None and var is not None:
        mean, var = mean.to(seen.input.dtype), var.to(seen.input.dtype)
    normalized = F.instance_norm(seen.input, mean, var, use_input_stats=own_statistics, eps=module.eps)
    return _affine(seen, normalized, tuple(range(2, seen.grad.ndim)))


def _affine(seen: Seen, normalized: Tensor, positions: tuple[int, ...]) -> dict[str, Form]:
    forms: dict[str, Form] = {}
    if "weight" in seen.needed:
        product = normalized.mul_(seen.grad)  # in place, as new memory is slow
        forms["weight"] = Dense(product.sum(positions) if positions else product)
    if "bias" in seen.needed:
        forms["bias"] = Dense(seen.grad.sum(positions) if positions else seen.grad)
    return forms
