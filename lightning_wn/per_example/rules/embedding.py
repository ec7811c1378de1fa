"""Rule for embeddings."""

from __future__ import annotations

from torch import nn

from lightning_wn.per_example.rules.errors import PerExampleError
from lightning_wn.per_example.rules.gradients import Form, Rows
from lightning_wn.per_example.rules.registry import Seen, register_per_example_rule


@register_per_example_rule(nn.Embedding)
def embedding(module: nn.Embedding, seen: Seen) -> dict[str, Form]:
    """Row v: Σ of D_t over the positions that looked v up; the padding row gets none."""
    if module.scale_grad_by_freq:
        raise PerExampleError(
            "Embedding with scale_grad_by_freq=True divides by counts over the whole batch, which leaves no example "
            "a gradient of its own: build it without, or leave its weight out of the measured parameters"
        )
    if module.max_norm is not None:
        raise PerExampleError(
            "Embedding with max_norm rescales its weight in every forward: build it without, or leave its weight "
            "out of the measured parameters"
        )
    batch = len(seen.input)
    index = seen.input.reshape(batch, -1).long()
    grad = seen.grad.reshape(batch, -1, module.embedding_dim)
    if module.padding_idx is not None:
        grad = grad.masked_fill((index == module.padding_idx).unsqueeze(-1), 0.0)
    return {"weight": Rows(index, grad)}
