"""Where the batch lies in the tensors that go into a module and come out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

Axes = list[int | None]
"""For each tensor the batch dimension, or None for one that all examples share."""


def leading_axes(tensors: Sequence[Tensor], batch_size: int, axis: int = 0) -> Axes:
    """Take every tensor that has ``batch_size`` entries along the axis for a batch, all others for shared."""
    return [axis if t.ndim > axis and t.shape[axis] == batch_size else None for t in tensors]


def _recurrent(module: nn.RNNBase, args: Any, tensors: Sequence[Tensor], batch_size: int) -> Axes:
    # the sequence is the only tensor whose batch dimension depends on batch_first; states have it second
    return [1 if index > 0 or not module.batch_first else 0 for index in range(len(tensors))]


def _attention(module: nn.MultiheadAttention, args: Any, tensors: Sequence[Tensor], batch_size: int) -> Axes:
    sequence_axis = 0 if module.batch_first else 1
    axes: Axes = []
    for tensor in tensors:
        if tensor.ndim == 3 and tensor.shape[-1] in {module.embed_dim, module.kdim, module.vdim}:
            axes.append(sequence_axis)
        else:
            axes.append(None)
    # key_padding_mask (B, S) is told from attn_mask (T, S) by its place in the call
    positional, keywords = args
    padding_mask = keywords.get("key_padding_mask", positional[3] if len(positional) > 3 else None)
    return [0 if tensor is padding_mask else axis for tensor, axis in zip(tensors, axes, strict=True)]


_INPUT_AXES: dict[type[nn.Module], Callable[[Any, Any, Sequence[Tensor], int], Axes]] = {
    nn.RNNBase: _recurrent,
    nn.MultiheadAttention: _attention,
}


def has_own_axes(module: nn.Module) -> bool:
    """Whether the module says itself where its batch is, by ``batch_first``."""
    return any(cls in _INPUT_AXES for cls in type(module).__mro__)


def input_axes(module: nn.Module, args: Any, tensors: Sequence[Tensor], batch_size: int, axis: int) -> Axes:
    """Find the batch dimension of every tensor among a call's arguments ``(args, kwargs)``."""
    for cls in type(module).__mro__:
        if cls in _INPUT_AXES:
            return _INPUT_AXES[cls](module, args, tensors, batch_size)
    return leading_axes(tensors, batch_size, axis)


def output_axes(module: nn.Module, tensors: Sequence[Tensor], batch_size: int, axis: int) -> Axes:
    """Find the batch dimension of every tensor among a call's results."""
    if isinstance(module, nn.RNNBase):
        return [1 if index > 0 or not module.batch_first else 0 for index in range(len(tensors))]
    if isinstance(module, nn.MultiheadAttention):
        return [0 if index > 0 or module.batch_first else 1 for index in range(len(tensors))]
    return leading_axes(tensors, batch_size, axis)
