"""Where the batch lies in the tensors that go into a module and come out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

Axes = list[int | None]
"""For each tensor the batch dimension, or None for one that all examples share."""


def leading_axes(tensors: Sequence[Tensor], batch_size: int, axis: int = 0) -> Axes:
    """Take every tensor that has ``batch_size`` entries along the axis for a batch, all others for shared."""
    return [axis if t.ndim > axis and t.shape[axis] == batch_size else None for t in tensors]


def has_own_axes(module: nn.Module) -> bool:
    """Whether the module says itself where its batch is, by ``batch_first``."""
    return isinstance(module, nn.RNNBase | nn.MultiheadAttention)


def input_axes(module: nn.Module, args: Any, tensors: Sequence[Tensor], batch_size: int, axis: int) -> Axes:
    """Find the batch dimension of every tensor among a call's arguments ``(args, kwargs)``."""
    if isinstance(module, nn.RNNBase):
        return _recurrent(module, tensors)
    if isinstance(module, nn.MultiheadAttention):
        widths = {module.embed_dim, module.kdim, module.vdim}
        # key_padding_mask (B, S) is told from attn_mask (T, S) by its place in the call
        positional, keywords = args
        padding_mask = keywords.get("key_padding_mask", positional[3] if len(positional) > 3 else None)
        sequence_axis = 0 if module.batch_first else 1
        return [
            0 if t is padding_mask else sequence_axis if t.ndim == 3 and t.shape[-1] in widths else None
            for t in tensors
        ]
    return leading_axes(tensors, batch_size, axis)


def output_axes(module: nn.Module, tensors: Sequence[Tensor], batch_size: int, axis: int) -> Axes:
    """Find the batch dimension of every tensor among a call's results."""
    if isinstance(module, nn.RNNBase):
        return _recurrent(module, tensors)
    if isinstance(module, nn.MultiheadAttention):
        return [0 if index > 0 or module.batch_first else 1 for index in range(len(tensors))]
    return leading_axes(tensors, batch_size, axis)


def _recurrent(module: nn.RNNBase, tensors: Sequence[Tensor]) -> Axes:
    # the sequence is the only tensor whose batch dimension depends on batch_first; states have it second
    return [1 if index > 0 or not module.batch_first else 0 for index in range(len(tensors))]
