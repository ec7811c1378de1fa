"""Rule for fully connected layers."""

from __future__ import annotations

from torch import nn

from lightning_wn.noise_scale.probes.per_example.forms import Dense, Form, Outer
from lightning_wn.noise_scale.probes.per_example.registry import Seen, register_per_example_rule


@register_per_example_rule(nn.Linear)
def linear(module: nn.Linear, seen: Seen) -> dict[str, Form]:
    """Weight: Σ_t D_t ⊗ x_t (Goodfellow, arXiv 1510.01799, for one position). Bias: Σ_t D_t."""
    batch = len(seen.input)
    x = seen.input.reshape(batch, -1, module.in_features)  # (N, T, in)
    grad = seen.grad.reshape(batch, -1, module.out_features)  # (N, T, out)
    forms: dict[str, Form] = {}
    if "weight" in seen.needed:
        forms["weight"] = Outer(grad.unsqueeze(1), x.unsqueeze(1))
    if "bias" in seen.needed:
        forms["bias"] = Dense(grad.sum(1))
    return forms
