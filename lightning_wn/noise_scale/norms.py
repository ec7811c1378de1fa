"""Norms of many tensors in few kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def norm_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Return the type in which to sum the squares of such a tensor: float32 at least; None is its own."""
    return torch.float32 if dtype in _LOW_PRECISION else None


def require_dense(gradient: Tensor) -> None:
    """Raise ValueError for a sparse gradient, of which only some versions of torch can take a norm."""
    if gradient.layout is not torch.strided:
        raise ValueError(
            f"A noise scale cannot be read off the {gradient.layout} gradient of a parameter of shape "
            f"{tuple(gradient.shape)}; look it up with `sparse=False`, or keep the parameter itself dense."
        )


def foreach_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of each gradient, in the order of the gradients, in float32 at least.

    Raises:
        ValueError: If one is sparse.
    """
    places: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        require_dense(tensor)
        places.setdefault(tensor.dtype, []).append(place)
    norms = list(tensors)
    for dtype, group in places.items():
        found = torch._foreach_norm([tensors[place] for place in group], 2, dtype=norm_dtype(dtype))
        for place, norm in zip(group, found, strict=True):
            norms[place] = norm
    return norms


def sum_of_squares(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the squared norm of all tensors together, shape (), in the type and on the device of ``like``."""
    if not tensors:
        return torch.zeros_like(like)
    return torch.stack(foreach_norms(tensors)).to(like).square().sum()
