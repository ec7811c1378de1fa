"""Mean and variance of the values of each unit, over a batch and over the batches of all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from lightning_wn.summing import summing_dtype


@dataclass(frozen=True)
class UnitMoments:
    """Count, mean and summed squared deviation of the values of each unit.

    Attributes:
        count: The values of one unit, a scalar tensor; every unit has as many.
        mean: The mean of each unit, shape (units,).
        squares: The sum of squared deviations from the mean, shape (units,).
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    @property
    def variance(self) -> Tensor:
        """The biased variance, shape (units,)."""
        return self.squares / self.count


def unit_moments(values: Tensor, dim: int) -> UnitMoments:
    """Compute the moments over all dimensions but one.

    Args:
        values: In float32 or float64.
        dim: The dimension of the units.

    Returns:
        The moments, in float64 where the device has it.
    """
    wide = summing_dtype(values.device)
    rows = values.movedim(dim, 0).reshape(values.shape[dim], -1)
    count = torch.tensor(float(rows.shape[1]), dtype=wide, device=rows.device)
    mean = rows.sum(1, dtype=wide) / count.clamp_min(1.0)
    # in the type of the values, which saves a wide copy of them: the mean's rounding is theirs, too
    centered = rows - mean.to(rows.dtype).unsqueeze(1)
    return UnitMoments(count, mean, centered.square_().sum(1, dtype=wide))


def gather_ranks(row: Tensor) -> Tensor:
    """Collect one row of numbers from each rank, shape (ranks, numbers): (1, numbers) in one process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return row.unsqueeze(0)
    rows = [torch.empty_like(row) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, row)
    return torch.stack(rows)


def pool_moments(counts: Tensor, means: Tensor, squares: Tensor) -> UnitMoments:
    """Merge the moments of disjoint parts, in the order in which they are given.

    Args:
        counts: Shape (parts,); a part may be empty.
        means: Shape (parts, units).
        squares: Shape (parts, units).

    Returns:
        The moments of all parts together (Chan, Golub & LeVeque, *Updating Formulae and a Pairwise Algorithm
        for Computing Sample Variances*, 1979).
    """
    count = counts.sum()
    share = (counts / count.clamp_min(1.0)).unsqueeze(1)
    mean = (share * means).sum(0)
    between = (counts.unsqueeze(1) * (means - mean).square()).sum(0)
    return UnitMoments(count, mean, squares.sum(0) + between)
