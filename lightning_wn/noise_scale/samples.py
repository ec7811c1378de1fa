"""What every probe ends in: the gradient samples of one optimizer step, as a short row of sums.

A row holds sums over samples only. Adding the rows of all ranks therefore gives the row of all samples,
and one small all-reduce carries many measurements.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from lightning_wn.noise_scale.statistics import solve_noise_scale
from lightning_wn.summing import summing_dtype

NUM_CHECKSUMS = 4
"""Random projections of the gradient that travel with the samples."""

# columns of a row; Σ runs over the samples of all ranks once the ranks' rows are added
_RANKS, _FULL, _IRREGULAR, _COUNT, _MICRO_BATCHES = range(5)  # per rank: 1, flags, K, micro-batches
_EXAMPLES, _GRAD_SQ_NORM = range(5, 7)  # Σn, |ḡ|²
_WEIGHT, _W_SQ_NORM, _W_INVERSE, _W2_INVERSE = range(7, 11)  # Σw, Σw|g|², Σw/n, Σw²/n
_W_CHECK = slice(11, 11 + NUM_CHECKSUMS)
_W_CHECK_SQ = slice(_W_CHECK.stop, _W_CHECK.stop + NUM_CHECKSUMS)
_GRAD_CHECK = slice(_W_CHECK_SQ.stop, _W_CHECK_SQ.stop + NUM_CHECKSUMS)
_GRAD_CHECK_SQ = slice(_GRAD_CHECK.stop, _GRAD_CHECK.stop + NUM_CHECKSUMS)
ROW_SIZE: int = _GRAD_CHECK_SQ.stop
"""Columns of a row without groups; each set of parameters beside the total adds Σw|g|² and |ḡ|²."""


class Rejection(enum.IntEnum):
    """Why an optimizer step is no measurement."""

    SINGLE_SAMPLE = 0
    NON_FINITE = 1
    MISMATCH = 2
    IRREGULAR = 3
    EMPTY = 4


@dataclass(frozen=True, kw_only=True)
class GradientSamples:
    """One rank's gradient samples of one optimizer step, beside the gradient that the optimizer sees.

    Attributes:
        sq_norms: |g_k|² of this rank's K samples, shape (K,); with V sets of parameters, shape (K, V), the first
            column being that of all measured parameters. NaN in another column is a norm that is not there yet.
        sizes: Examples n_k behind each sample, shape (K,): numbers, or a tensor that stays on its device.
        weights: Weight w_k of each sample in the optimizer's gradient, shape (K,), up to one factor that
            all ranks share: numbers, or a tensor that stays on its device.
        grad_sq_norm: |ḡ|² of the weighted mean over the samples of all ranks, shape () or (V,).
        checksums: Fixed linear functions of each sample's gradient, shape (K, NUM_CHECKSUMS), or None.
        checksum_sizes: How large each checksum's terms are, the root of their sum of squares, shape
            (K, NUM_CHECKSUMS); their rounding is in proportion to it, however much they cancel. The checksums'
            own magnitudes by default.
        grad_checksums: The same functions of ḡ, shape (NUM_CHECKSUMS,), or None.
        grad_in_shards: Whether ``grad_checksums`` is this rank's shard's part, times the ranks over the copies of
            that shard, so that the mean over ranks is the whole; ranks then differ without anything being wrong.
        examples: Examples in this rank's optimizer step; the sum of ``sizes`` by default.
        micro_batches: Micro-batches in this rank's optimizer step; one a sample by default.
        full: Whether this was a full accumulation window of full batches; only those tell the batch size in use.
        irregular: Whether the probe saw what it cannot interpret; the step is then dropped on all ranks.
    """

    sq_norms: Tensor
    sizes: Sequence[float] | Tensor
    weights: Sequence[float] | Tensor
    grad_sq_norm: Tensor
    checksums: Tensor | None = None
    checksum_sizes: Tensor | None = None
    grad_checksums: Tensor | None = None
    grad_in_shards: bool = False
    examples: float | Tensor | None = None
    micro_batches: int | None = None
    full: bool = True
    irregular: bool = False

    def to_row(self) -> Tensor:
        """Return this rank's sums, shape (ROW_SIZE + 2 (V - 1),), on the samples' device, without waiting for it."""
        device = self.sq_norms.device
        dtype = summing_dtype(device)
        count = len(self.weights)
        micro_batches = count if self.micro_batches is None else self.micro_batches
        head = [1.0, float(self.full), float(self.irregular), float(count), float(micro_batches)]
        known = [values for values in (self.weights, self.sizes) if not isinstance(values, Tensor)]
        host = _to_device([*head, *chain(*known)], device, dtype)
        # what was known on the host travels there in one copy
        parts = list(torch.split(host[len(head) :], count))
        weights, sizes = (
            values.to(device, dtype) if isinstance(values, Tensor) else parts.pop(0)
            for values in (self.weights, self.sizes)
        )
        checksums, grad_checksums = self.checksums, self.grad_checksums
        if checksums is None or grad_checksums is None:
            checksums = torch.zeros(count, NUM_CHECKSUMS, device=device, dtype=dtype)
            grad_checksums = torch.zeros(NUM_CHECKSUMS, device=device, dtype=dtype)
        checksums = checksums.to(dtype)
        checksum_sizes = checksums if self.checksum_sizes is None else self.checksum_sizes.to(dtype)
        sq_norms, grad_sq_norm = self.sq_norms.to(dtype).reshape(count, -1), self.grad_sq_norm.to(dtype).reshape(-1)
        columns = (torch.ones_like(weights), sq_norms[:, 0], 1.0 / sizes, weights / sizes)
        per_sample = torch.cat((torch.stack(columns, dim=1), checksums, checksum_sizes.square()), dim=1)
        examples = sizes.sum() if self.examples is None else torch.as_tensor(self.examples, dtype=dtype).to(device)
        totals = torch.stack((examples, grad_sq_norm[0]))
        grad_checksums = grad_checksums.to(dtype)
        # of no spread where ranks differ by design
        squares = torch.zeros_like(grad_checksums) if self.grad_in_shards else grad_checksums.square()
        others = (weights @ sq_norms[:, 1:], grad_sq_norm[1:])
        return torch.cat((host[: len(head)], totals, weights @ per_sample, grad_checksums, squares, *others))

    def scaled(self, factor: float) -> GradientSamples:
        """Return the samples of gradients that are all this many times as long."""
        square = factor * factor
        return replace(
            self,
            sq_norms=self.sq_norms * square,
            grad_sq_norm=self.grad_sq_norm * square,
            checksums=None if self.checksums is None else self.checksums * factor,
            checksum_sizes=None if self.checksum_sizes is None else self.checksum_sizes * factor,
            grad_checksums=None if self.grad_checksums is None else self.grad_checksums * factor,
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One usable measurement: the unbiased pairs, and how many examples the step had.

    Attributes:
        pairs: One step's estimates of |G|², unbiased, very noisy, often negative, and of tr(Σ), unbiased, never
            negative: of all measured parameters, then of the other sets; None where a set has no norms yet.
        examples: Examples in the optimizer step, over all ranks.
        micro_batches: Micro-batches in it, over all ranks.
        ranks: Ranks.
        full: Whether the accumulation windows were full on all ranks.
    """

    pairs: tuple[tuple[float, float] | None, ...]
    examples: float
    micro_batches: int
    ranks: int
    full: bool


def measurement_from_row(row: Sequence[float], checksum_tolerance: float) -> Measurement | Rejection:
    """Solve the two equations for the summed row of all ranks, or say why that step measures nothing.

    Args:
        row: Sum over ranks of :meth:`GradientSamples.to_row`.
        checksum_tolerance: Largest allowed difference between the samples' mean checksum and that of each
            rank's optimizer gradient, relative to the root mean square of the checksums' sizes.

    Returns:
        A :class:`Measurement` or a :class:`Rejection`.
    """
    ranks, weight = row[_RANKS], row[_WEIGHT]
    if row[_IRREGULAR] > 0:
        return Rejection.IRREGULAR
    if not math.isfinite(row[_W_INVERSE]):  # what no example is behind has no weight among them
        return Rejection.EMPTY
    if row[_COUNT] >= 2 and not all(map(math.isfinite, row[:ROW_SIZE])):
        return Rejection.NON_FINITE
    inverse_sizes = (row[_W_INVERSE] / weight, row[_W2_INVERSE] / weight**2) if weight > 0.0 else (0.0, 0.0)
    # all but one may be masked out, and then count nothing
    if row[_COUNT] < 2 or inverse_sizes[0] <= inverse_sizes[1] * (1.0 + 1e-9):
        return Rejection.SINGLE_SAMPLE
    if _checksums_differ(row, checksum_tolerance):
        return Rejection.MISMATCH
    others = (len(row) - ROW_SIZE) // 2
    small = [row[_W_SQ_NORM], *row[ROW_SIZE : ROW_SIZE + others]]
    big = [row[_GRAD_SQ_NORM], *row[ROW_SIZE + others :]]
    return Measurement(
        pairs=tuple(
            solve_noise_scale(sample / weight, grad / ranks, *inverse_sizes)
            if math.isfinite(sample) and math.isfinite(grad)
            else None
            for sample, grad in zip(small, big, strict=True)
        ),
        examples=row[_EXAMPLES],
        micro_batches=round(row[_MICRO_BATCHES]),
        ranks=round(ranks),
        full=row[_FULL] == ranks,
    )


def _checksums_differ(row: Sequence[float], tolerance: float) -> bool:
    ranks, weight = row[_RANKS], row[_WEIGHT]
    checks = zip(row[_W_CHECK], row[_W_CHECK_SQ], row[_GRAD_CHECK], row[_GRAD_CHECK_SQ], strict=True)
    for check, check_sq, grad_check, grad_check_sq in checks:
        allowed = tolerance * math.sqrt(check_sq / weight)
        mean = grad_check / ranks
        # where ranks do not average, their own gradients add up all the same, but differ
        spread = math.sqrt(max(grad_check_sq / ranks - mean * mean, 0.0))
        if max(abs(check / weight - mean), spread) > allowed:
            return True
    return False


def _to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a few host numbers to the device without waiting for it."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)
