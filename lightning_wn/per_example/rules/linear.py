"""Rule for fully connected layers."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_wn.per_example.rules.gradients import Dense, Form, Outer
from lightning_wn.per_example.rules.registry import Seen, register_per_example_rule


@register_per_example_rule(nn.Linear)
def linear(module: nn.Linear, seen: Seen) -> dict[str, Form]:
    """Weight: Σ_t D_t ⊗ x_t (Goodfellow, arXiv 1510.01799, for one position). Bias: Σ_t D_t."""
    x, grad = _positions(seen)
    return _answer(seen, Outer(grad.unsqueeze(1), x.unsqueeze(1)), grad)


@register_per_example_rule("transformers.pytorch_utils.Conv1D")
def transposed_linear(module: nn.Module, seen: Seen) -> dict[str, Form]:
    """The same with the weight stored as (in, out), as GPT-2 has it."""
    x, grad = _positions(seen)
    return _answer(seen, Outer(x.unsqueeze(1), grad.unsqueeze(1)), grad)


def _positions(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return input and output gradient as (N, T, features)."""
    batch = len(seen.input)
    # the gradient by a complex weight has the conjugate of the input; resolved, as a real one costs nothing
    x, grad = seen.input.conj().resolve_conj(), seen.grad
    # a width may be zero, and then -1 does not tell the number of positions
    positions = x.shape[1:-1].numel()
    return x.reshape(batch, positions, x.shape[-1]), grad.reshape(batch, positions, grad.shape[-1])


def _answer(seen: Seen, weight: Form, grad: Tensor) -> dict[str, Form]:
    forms: dict[str, Form] = {}
    if "weight" in seen.needed:
        forms["weight"] = weight
    if "bias" in seen.needed:
        forms["bias"] = Dense(grad.sum(1))
    return forms
