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
from typing import Any

import torch
from torch import Tensor

from lightning_wn.noise_scale.parts import PartMeasurement
from lightning_wn.noise_scale.statistics import solve_noise_scale
from lightning_wn.summing import summing_dtype

NUM_CHECKSUMS = 4
"""Random projections of the gradient that travel with the samples."""
_ENOUGH_CHECKSUMS = 3
"""So many tell one factor on the whole gradient from other edits."""
_CLOSER = 0.05
"""Share of the tolerance that one factor leaves: checksums that nearly cancel would agree with any."""

# columns of a row; Σ runs over the samples of all ranks once the ranks' rows are added
_RANKS, _FULL, _IRREGULAR, _COUNT, _MICRO_BATCHES = range(5)  # per rank: 1, flags, K, micro-batches
_REPEATS, _RESCALED, _PARTS = range(5, 8)  # per rank: flags, micro-batches in ḡ
_EXAMPLES, _COUNTED, _GRAD_SQ_NORM = range(8, 11)  # Σn of the step and in ḡ, |ḡ|²
_WEIGHT, _W_SQ_NORM, _W_INVERSE, _W2_INVERSE, _W2, _W2_SQ_NORM = range(11, 17)  # Σw, Σw|g|², Σw/n, Σw²/n, Σw², Σw²|g|²
_SIZES, _SIZES2 = range(17, 19)  # Σn of the samples, Σn²
_ROOT_SQ_NORM, _INVERSE_ROOT_SQ_NORM = range(19, 21)  # Σ√n|g|², Σ|g|²/√n, where weights are guessed
_W_CHECK = slice(21, 21 + NUM_CHECKSUMS)
_W_CHECK_SQ = slice(_W_CHECK.stop, _W_CHECK.stop + NUM_CHECKSUMS)
_GRAD_CHECK = slice(_W_CHECK_SQ.stop, _W_CHECK_SQ.stop + NUM_CHECKSUMS)
_GRAD_CHECK_SQ = slice(_GRAD_CHECK.stop, _GRAD_CHECK.stop + NUM_CHECKSUMS)
ROW_SIZE: int = _GRAD_CHECK_SQ.stop
"""Columns of a row without groups; each set of parameters beside the total adds COLUMNS_OF_SET to them."""
COLUMNS_OF_SET = 3
"""Σw|g|², Σw²|g|² and |ḡ|²."""

# how far from proportional to sizes weights may be by rounding alone
_PROPORTIONAL = 1e-5


class Rejection(enum.IntEnum):
    """Why an optimizer step is no measurement."""

    SINGLE_SAMPLE = 0
    NON_FINITE = 1
    MISMATCH = 2
    IRREGULAR = 3
    EMPTY = 4


class Rescaled(enum.IntEnum):
    """What takes a factor that only all ranks together know, their Σ w_k over the number of ranks."""

    NEITHER = 0
    SAMPLES = 1
    """The samples are mean gradients over that factor."""
    MEAN = -1
    """The gradient is the samples' weighted mean times that factor."""


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
        counted: Examples behind ``grad_sq_norm`` on this rank, where that is not the optimizer step's own gradient.
        parts: Micro-batches behind it.
        full: Whether this was a full accumulation window of full batches; only those tell the batch size in use.
        repeats: Whether every optimizer step has the same examples, as where one holds all data.
        irregular: Whether the probe saw what it cannot interpret; the step is then dropped on all ranks.
        rescaled: What is still to be multiplied, once Σ w_k over all ranks is known.
        weights_guessed: Whether the weights, equal ones, are a guess, and may be in proportion to the sizes as well.
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
    counted: float | Tensor | None = None
    parts: int | None = None
    full: bool = True
    repeats: bool = False
    irregular: bool = False
    rescaled: Rescaled = Rescaled.NEITHER
    weights_guessed: bool = False

    def to_row(self) -> Tensor:
        """Return this rank's sums on the samples' device, without waiting for it.

        Shape (ROW_SIZE + COLUMNS_OF_SET (V - 1),).
        """
        device = self.sq_norms.device
        dtype = summing_dtype(device)
        count = len(self.weights)
        micro_batches = count if self.micro_batches is None else self.micro_batches
        parts = micro_batches if self.parts is None else self.parts
        flags = map(float, (self.full, self.irregular, count, micro_batches, self.repeats, self.rescaled, parts))
        examples, counted = self.examples, self.examples if self.counted is None else self.counted
        totals = [0.0 if value is None or isinstance(value, Tensor) else float(value) for value in (examples, counted)]
        head = [1.0, *flags, *totals]
        known = [values for values in (self.weights, self.sizes) if not isinstance(values, Tensor)]
        host = _to_device([*head, *chain(*known)], device, dtype)
        # what was known on the host travels there in one copy
        copied = list(torch.split(host[len(head) :], count))
        weights, sizes = (
            values.to(device, dtype) if isinstance(values, Tensor) else copied.pop(0)
            for values in (self.weights, self.sizes)
        )
        checksums, grad_checksums = self.checksums, self.grad_checksums
        if checksums is None or grad_checksums is None:
            checksums = torch.zeros(count, NUM_CHECKSUMS, device=device, dtype=dtype)
            grad_checksums = torch.zeros(NUM_CHECKSUMS, device=device, dtype=dtype)
        checksums = checksums.to(dtype)
        checksum_sizes = checksums if self.checksum_sizes is None else self.checksum_sizes.to(dtype)
        sq_norms, grad_sq_norm = self.sq_norms.to(dtype).reshape(count, -1), self.grad_sq_norm.to(dtype).reshape(-1)
        total = sq_norms[:, 0]
        columns = (torch.ones_like(weights), total, 1.0 / sizes, weights / sizes, weights, weights * total)
        sums = weights @ torch.stack(columns, dim=1)
        roots = (sizes.sqrt(), sizes.rsqrt()) if self.weights_guessed else (torch.zeros_like(sizes),) * 2
        of_sizes = torch.stack((sizes.sum(), sizes @ sizes, *(root @ total for root in roots)))
        checks = weights @ torch.cat((checksums, checksum_sizes.square()), dim=1)
        on_device = [
            sizes.sum() if value is None else value.to(device, dtype) if isinstance(value, Tensor) else host[place]
            for place, value in ((_EXAMPLES, examples), (_COUNTED, counted))
        ]
        first = torch.cat((host[:_EXAMPLES], torch.stack((*on_device, grad_sq_norm[0]))))
        grad_checksums = grad_checksums.to(dtype)
        # of no spread where ranks differ by design
        squares = torch.zeros_like(grad_checksums) if self.grad_in_shards else grad_checksums.square()
        others = (weights @ sq_norms[:, 1:], weights.square() @ sq_norms[:, 1:], grad_sq_norm[1:])
        return torch.cat((first, sums, of_sizes, checks, grad_checksums, squares, *others))

    def weighted_by_sizes(self, rescaled: Rescaled) -> GradientSamples:
        """Return the samples of losses that are sums, up to a factor, where a probe took them for means of weight 1.

        What a backward pass gave is n_k g_k up to that factor, so g_k is a share of it and the weight is n_k. A
        sample that counts nothing has no weight.

        Args:
            rescaled: What ``rescaled`` has to be: the samples where sums were divided by the window's count, over all
                ranks, and the mean where they were not.
        """
        dtype, device = summing_dtype(self.sq_norms.device), self.sq_norms.device
        weights, sizes = (
            values.to(device, dtype) if isinstance(values, Tensor) else _to_device([*values], device, dtype)
            for values in (self.weights, self.sizes)
        )
        counted = (weights > 0.0) & (sizes > 0.0)
        factor = torch.where(counted, weights / sizes, 0.0)

        def times(values: Tensor, factor: Tensor) -> Tensor:
            return values.to(dtype) * factor.reshape(-1, *[1] * (values.ndim - 1))

        gradient = weights.sum()
        own_sizes = torch.where(counted, sizes, 0.0)
        return replace(
            self,
            sq_norms=times(self.sq_norms, factor.square()),
            sizes=torch.where(counted, sizes, 1.0),
            weights=own_sizes,
            grad_sq_norm=self.grad_sq_norm * gradient.square(),
            checksums=None if self.checksums is None else times(self.checksums, factor),
            checksum_sizes=None if self.checksum_sizes is None else times(self.checksum_sizes, factor),
            grad_checksums=None if self.grad_checksums is None else self.grad_checksums * gradient,
            examples=own_sizes.sum() if self.examples is None else self.examples,
            rescaled=rescaled,
            # of a sample that is a sum of several micro-batches' gradients, their counts are not known any more
            irregular=self.irregular or (not isinstance(self.weights, Tensor) and any(w != 1.0 for w in self.weights)),
        )

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
    """One usable measurement, and how many examples the step had.

    Attributes:
        pairs: One step's estimates of |G|², unbiased, very noisy, often negative, and of tr(Σ), unbiased, never
            negative: of all measured parameters, then of the other sets; None where a set has no norms yet.
        part_measurements: The same where what is counted are parts of examples; empty otherwise, as ``pairs`` is here.
        trend: Whether w_k|g_k| rises with the sizes where the weights are a guess: positive where it does so like
            weights in proportion to sizes, negative where like equal weights, 0 where nothing can be told.
        examples: Examples in the optimizer step, over all ranks.
        micro_batches: Micro-batches in it, over all ranks.
        ranks: Ranks.
        full: Whether the accumulation windows were full on all ranks.
        repeats: Whether every optimizer step has the same examples.
    """

    pairs: tuple[tuple[float, float] | None, ...] = ()
    part_measurements: tuple[PartMeasurement | None, ...] = ()
    trend: float = 0.0
    examples: float
    micro_batches: int
    ranks: int
    full: bool
    repeats: bool


def measurement_from_row(
    row: Sequence[float], checksum_tolerance: float, *, parts: bool = False, by_sizes: bool = False
) -> Measurement | Rejection:
    """Make a measurement of the summed row of all ranks, or say why that step measures nothing.

    Args:
        row: Sum over ranks of :meth:`GradientSamples.to_row`.
        checksum_tolerance: Largest allowed difference between the samples' mean checksum and that of each
            rank's optimizer gradient, relative to the root mean square of the checksums' sizes.
        parts: Whether what is counted are parts of examples, so that only different samples are independent;
            otherwise the two equations are solved.
        by_sizes: Whether weights that were guessed to be equal are in proportion to the sizes instead.

    Returns:
        A :class:`Measurement` or a :class:`Rejection`.
    """
    if (rejection := _rejection(row)) is not None:
        return rejection
    ranks, weight = row[_RANKS], row[_WEIGHT]
    inverse_sizes = row[_W_INVERSE] / weight, row[_W2_INVERSE] / weight**2
    total = weight / ranks
    of_samples = total if row[_RESCALED] > 0 else 1.0
    of_mean = 1.0 / total if row[_RESCALED] < 0 else 1.0
    factor = _common_factor(row, checksum_tolerance, of_samples, of_mean)
    if factor is None:
        return Rejection.MISMATCH
    of_mean /= factor
    others = (len(row) - ROW_SIZE) // COLUMNS_OF_SET
    rest = row[ROW_SIZE:]
    columns = zip(
        [row[_W_SQ_NORM], *rest[:others]],
        [row[_W2_SQ_NORM], *rest[others : 2 * others]],
        [row[_GRAD_SQ_NORM], *rest[2 * others :]],
        strict=True,
    )
    # mean, own and optimizer's squared norms of each set of parameters
    sets = [
        (mean * of_samples**2 / weight, own * of_samples**2 / weight**2, grad * of_mean**2 / ranks)
        for mean, own, grad in columns
    ]
    known: dict[str, Any] = {
        "examples": row[_EXAMPLES],
        "micro_batches": round(row[_MICRO_BATCHES]),
        "ranks": round(ranks),
        "full": row[_FULL] == ranks,
        "repeats": row[_REPEATS] == ranks,
    }
    if not parts:
        pairs = (
            solve_noise_scale(mean, grad, *inverse_sizes) if _all_finite(mean, grad) else None for mean, _, grad in sets
        )
        return Measurement(pairs=tuple(pairs), **known)
    # what w_k g_k is does not depend on the guess
    by_sizes &= row[_INVERSE_ROOT_SQ_NORM] > 0.0
    common: dict[str, Any] = {
        "squared_weights": row[_SIZES2] / row[_SIZES] ** 2 if by_sizes else row[_W2] / weight**2,
        "count": row[_COUNTED],
        "micro_batches": row[_PARTS],
        # by the inequality of Cauchy and Schwarz equal to 1 there, and larger elsewhere
        "follows_sizes": by_sizes or row[_COUNTED] * inverse_sizes[1] < 1.0 + _PROPORTIONAL,
    }
    part_measurements = (
        PartMeasurement(grad_sq_norm=grad, own_sq_norm=own, **common) if _all_finite(own, grad) else None
        for _, own, grad in sets
    )
    return Measurement(part_measurements=tuple(part_measurements), trend=_trend(row), **known)


def _trend(row: Sequence[float]) -> float:
    """Return the relative covariance of n_k and w_k²|g_k|²/√n_k.

    Equal weights have w²|g|² between constant and falling like 1/n; weights in proportion to sizes have it rise like n
    or n². The root of n lies in the middle between them.
    """
    if not row[_INVERSE_ROOT_SQ_NORM]:
        return 0.0
    return row[_ROOT_SQ_NORM] / row[_INVERSE_ROOT_SQ_NORM] * row[_COUNT] / row[_SIZES] - 1.0


def _all_finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _rejection(row: Sequence[float]) -> Rejection | None:
    """Return why a row holds nothing to compare, or None."""
    if row[_IRREGULAR] > 0:
        return Rejection.IRREGULAR
    if not math.isfinite(row[_W_INVERSE]):  # what no example is behind has no weight among them
        return Rejection.EMPTY
    if row[_COUNT] >= 2 and not all(map(math.isfinite, row[:ROW_SIZE])):
        return Rejection.NON_FINITE
    weight = row[_WEIGHT]
    # all but one may be masked out, and then count nothing
    if row[_COUNT] < 2 or weight <= 0.0 or row[_W_INVERSE] * weight <= row[_W2_INVERSE] * (1.0 + 1e-9):
        return Rejection.SINGLE_SAMPLE
    return None


def _common_factor(row: Sequence[float], tolerance: float, of_samples: float, of_mean: float) -> float | None:
    """Return what the samples' mean was multiplied with to become the optimizer's gradient; None if by no one number.

    It is 1 unless somebody rescaled the whole gradient, as clipping by its norm does. One checksum or two would agree
    with many other edits, too.
    """
    ranks, weight = row[_RANKS], row[_WEIGHT]
    of_sums = [check / weight * of_samples for check in row[_W_CHECK]]
    of_grad = [check / ranks * of_mean for check in row[_GRAD_CHECK]]
    allowed = [tolerance * math.sqrt(square / weight) * of_samples for square in row[_W_CHECK_SQ]]
    # where ranks do not average, their own gradients add up all the same, but differ
    spreads = [
        math.sqrt(max(square / ranks * of_mean**2 - mean * mean, 0.0))
        for square, mean in zip(row[_GRAD_CHECK_SQ], of_grad, strict=True)
    ]

    def fits(factor: float, share: float = 1.0) -> bool:
        checks = zip(of_sums, of_grad, spreads, allowed, strict=True)
        return all(max(abs(a * factor - b), spread) <= most * factor * share for a, b, spread, most in checks)

    if fits(1.0):
        return 1.0
    square = sum(a * a for a in of_sums)
    told_by = sum(abs(a) > most for a, most in zip(of_sums, allowed, strict=True))
    if told_by < _ENOUGH_CHECKSUMS:
        return None
    factor = sum(a * b for a, b in zip(of_sums, of_grad, strict=True)) / square
    return factor if factor > 0.0 and fits(factor, _CLOSER) else None


def _to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a few host numbers to the device without waiting for it."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)
