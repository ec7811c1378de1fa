"""The rows of tensors that belong to single examples, and how they are exchanged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_wn.per_example.engine.layers import BatchDim

MAX_KEPT = 16


def has_rows(tensor: Tensor, dim: BatchDim, batch_size: int) -> bool:
    """Whether a dense floating-point tensor has one row an example along the dimension."""
    if tensor.layout != torch.strided or tensor.is_nested or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    if tensor.numel() == 0:
        return False
    if dim == "folded":
        return tensor.ndim > 0 and tensor.shape[0] % batch_size == 0
    return tensor.ndim > dim and tensor.shape[dim] == batch_size


def by_example(tensor: Tensor, dim: BatchDim, batch_size: int) -> Tensor:
    """Return a view, or a copy where there is none, with the examples first: (B, ...)."""
    if dim == "folded":
        return tensor.reshape(batch_size, -1, *tensor.shape[1:])
    return tensor.movedim(dim, 0)


def _back(tensor: Tensor, dim: BatchDim) -> Tensor:
    return tensor.flatten(0, 1) if dim == "folded" else tensor.movedim(0, dim)


@dataclass(frozen=True)
class Swap:
    """Puts rows of other examples in the place of all rows but some.

    Attributes:
        kept: The rows that stay, by index.
        source: For every row where its new values come from, shape (B,).
        factors: What these are multiplied by, shape (B,).
    """

    kept: Tensor
    source: Tensor
    factors: Tensor

    @classmethod
    def draw(cls, batch_size: int, generator: torch.Generator, *, stretch: float = 1.0) -> Swap:
        """Draw what stays, half of the rows, and for each of the rest another row, some of them several times.

        A permutation would leave sums over the batch as they are. Every second new row is made ``stretch`` times as
        large, and the rest smaller: that moves examples over thresholds that they are far from.
        """
        order = torch.randperm(batch_size, generator=generator)
        count = min(max(batch_size // 2, 1), MAX_KEPT)
        kept, new = order[:count], order[count:]
        rows = torch.arange(batch_size)
        source = (rows + torch.randint(1, batch_size, (batch_size,), generator=generator)) % batch_size
        source[kept] = kept
        factors = torch.ones(batch_size)
        if stretch > 1.0:
            factors[new] = 1.0 / 3.0
            factors[new[::2]] = stretch
        return cls(kept.sort().values, source, factors)

    def apply(self, tensor: Tensor, dim: BatchDim) -> Tensor:
        """Return the tensor with other rows; those that are new have no history."""
        rows = by_example(tensor, dim, len(self.source))
        shape = (-1, *[1] * (rows.ndim - 1))
        stays = torch.zeros(len(self.source), dtype=torch.bool)
        stays[self.kept] = True
        new = rows.detach()[self.source.to(rows.device)]
        if bool((self.factors != 1.0).any()):
            new = new * self.factors.to(rows.device, new.dtype).reshape(shape)
        return _back(torch.where(stays.to(rows.device).reshape(shape), rows, new), dim)
