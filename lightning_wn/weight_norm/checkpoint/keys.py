"""The keys of a weight in a file: plain, or as g and v in the ways of torch and of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_wn.weight_norm.core.parametrization import UnitLayout, compose


@dataclass(frozen=True)
class StoredWeight:
    """One weight in a state dict.

    Attributes:
        keys: The keys that it takes up: g and v, or the weight alone.
        values: Their values.
    """

    keys: tuple[str, ...]
    values: tuple[Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.values[-1].shape

    def weight(self) -> Tensor:
        """Return the weight, computed from g and v where these are stored."""
        return self.values[0] if len(self.values) == 1 else weight_from(*self.values)


def g_and_v_keys(prefix: str, name: str) -> tuple[str, str]:
    """Return the keys of g and v as torch's parametrizations name them, and this package too."""
    return f"{prefix}parametrizations.{name}.original0", f"{prefix}parametrizations.{name}.original1"


def find_weight(state_dict: Mapping[str, Tensor], prefix: str, name: str) -> StoredWeight | None:
    """Find a weight in a state dict, under any of the keys that it may have.

    Args:
        state_dict: The state dict.
        prefix: What is before the name of the tensor, with the dot.
        name: The name of the tensor.

    Returns:
        The weight, or None where it is not there.
    """
    known = (g_and_v_keys(prefix, name), (f"{prefix}{name}_g", f"{prefix}{name}_v"), (f"{prefix}{name}",))
    for keys in known:
        if all(key in state_dict for key in keys):
            return StoredWeight(keys, tuple(state_dict[key] for key in keys))
    return None


def weight_from(g: Tensor, v: Tensor) -> Tensor:
    """Compute w = v · (g/‖v‖) where only the shape of g tells what a unit is.

    That is any ``dim`` of torch's two weight norms, and the output channels of our own, with groups in a
    transposed convolution.

    Args:
        g: As stored: one number, or of the rank of v with the units on one dimension.
        v: As stored, of the shape of the weight.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    if g.ndim == 0:
        return compose(g, v, UnitLayout(per_tensor=True))
    if g.numel() == 1:
        return compose(g.reshape(1), v.reshape(1, -1), UnitLayout()).view(v.shape)
    dims = [dim for dim, size in enumerate(g.shape) if size > 1]
    if g.ndim == v.ndim and len(dims) == 1:
        (dim,) = dims
        if g.shape[dim] == v.shape[dim]:
            return compose(g.movedim(dim, 0), v.movedim(dim, 0), UnitLayout()).movedim(0, dim)
        groups, rest = divmod(g.shape[1], v.shape[1])
        if dim == 1 and rest == 0 and v.shape[0] % groups == 0:
            return compose(g, v, UnitLayout(transposed=True, groups=groups))
    raise ValueError(
        f"g of the shape {tuple(g.shape)} and v of the shape {tuple(v.shape)} are no weight normalization of one weight"
    )
