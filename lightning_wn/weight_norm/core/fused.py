"""torch's fused CPU kernels for w = v · (g/‖v‖), where they can stand in for the written-out formula."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, nn.Parameter))
_DTYPES = frozenset((torch.float32, torch.float64))
_forward = torch._weight_norm_interface
_backward = torch.ops.aten._weight_norm_interface_backward.default


def fused_weight(g: Tensor, v: Tensor) -> Tensor | None:
    """Compute w = v · (g/‖v‖) over the rows of v in one pass, and its gradients in another.

    The kernel divides zero rows by zero, so they are not for it, and neither are tracing, transforms of
    functions, forward-mode differentiation and other units, types, devices and layouts.

    Args:
        g: One number a row of v, shape (rows, 1, ...).
        v: Shape (rows, ...).

    Returns:
        w, of the shape of v; None where the formula has to be written out.
    """
    if not _is_supported(g, v):
        return None
    if torch.is_grad_enabled() and (g.requires_grad or v.requires_grad):
        return cast("Tensor | None", _apply(g, v))
    weight, norm = _forward(v, g, 0)
    return None if _has_zero(norm) else weight


def fused_norm(v: Tensor, norm: Tensor) -> Tensor:
    """Return ‖v‖ of each row as :func:`fused_weight` divides by it, bit for bit, or this norm where it does not.

    Args:
        v: Shape (rows, ...).
        norm: The norm of each row, shape (rows, 1, ...).
    """
    if not _is_supported(norm, v):
        return norm
    fused: Tensor = _forward(v, norm, 0)[1]
    return norm if _has_zero(fused) else fused


def _is_supported(g: Tensor, v: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(v) in _PLAIN
        and type(g) in _PLAIN
        and v.is_cpu
        and v.dtype in _DTYPES
        and v.is_contiguous()
        and g.numel() == v.shape[0]
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def _has_zero(norm: Tensor) -> bool:
    # not `(norm == 0).any()`, which costs four times as much; no device is waited for on a CPU
    return int(torch.count_nonzero(norm)) < norm.numel()


class _Fused(torch.autograd.Function):
    """The kernels, without torch's second derivative, which is wrong (seen in 2.13 by ``gradgradcheck``)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor) -> Tensor | None:
        """Compute w, or None where a row is zero."""
        weight, norm = _forward(v, g, 0)
        if _has_zero(norm):
            return None
        ctx.save_for_backward(g, v, norm)
        return weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Equation 3 of the paper: ∂g = <∂w, v>/‖v‖ and ∂v = g/‖v‖ (∂w - v <∂w, v>/‖v‖²)."""
        g, v, norm = ctx.saved_tensors
        if not torch.is_grad_enabled():
            grad_v, grad_g = _backward(grad.contiguous(), v, g, norm, 0)
            return grad_g, grad_v
        # to be differentiated again: with ‖v‖ as a function of v
        dims = tuple(range(1, v.ndim))
        norm = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
        along = (grad * v).sum(dims, keepdim=True) / norm
        return along, (g / norm) * (grad - v * (along / norm))


# `Function.apply` without what it prepares for transforms of functions, which are not for this kernel
_apply: Any = super(torch.autograd.Function, _Fused).apply
