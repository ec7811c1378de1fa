"""The noise scale as a torchmetrics metric, for any training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_wn.arguments import check_confidence
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.parts import PartMoments
from lightning_wn.noise_scale.samples import (
    COLUMNS_OF_SET,
    ROW_SIZE,
    GradientSamples,
    Measurement,
    Rejection,
    measurement_from_row,
)
from lightning_wn.noise_scale.statistics import PairMoments

EXAMPLES = "examples"
"""The unit that is independent of the others; every other one is a part of an example."""

# columns of the counts: the last full step's examples, micro-batches and ranks; whether steps repeat their examples;
# sums of examples and micro-batches over full steps, in weights like those of the moments; steps that tell how their
# samples are weighted, sum and sum of squares of what they tell, and whether it was by sizes; rejected steps by reason
_EXAMPLES, _MICRO_BATCHES, _RANKS, _REPEATS, _SUM_EXAMPLES, _SUM_MICRO_BATCHES = range(6)
_TRENDS, _SUM_TREND, _SUM_TREND_2, _BY_SIZES, _REJECTED = range(6, 11)
# so many steps have to tell, so many standard errors from zero, and more than rounding
_LEAST_TRENDS, _SURE, _LEAST_TREND = 4, 4.0, 1e-3


def _same_on_all_ranks(stacked: Tensor) -> Tensor:
    return stacked[0]


def _world_size() -> int:
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1


class GradientNoiseScale(Metric):
    """Gradient noise scale from the squared norms of gradients over few and over many examples.

    Each :meth:`update` is one optimizer step: the squared norms of this rank's gradient samples, and the
    squared norm of their mean over all ranks. The pairs (|G|², tr Σ) that solve the two equations of
    Appendix A.1 of arXiv 1812.06162, in the general form of
    :func:`lightning_wn.noise_scale.statistics.solve_noise_scale`, are smoothed apart by a bias-corrected
    exponential moving average and divided last. Updates are buffered on their device: nothing waits for
    the device and nothing is communicated until :meth:`compute` or :meth:`synchronize`.

    Saved states are as of the last :meth:`synchronize`: call it before saving a metric that is part of a model.

    A step with a single sample over all ranks carries no information and counts nowhere; so do steps with
    a non-finite norm on any rank, and steps whose checksums disagree.

    As input to ``update`` the metric takes

    - ``sample_sq_norms`` (Tensor): |g_k|² of this rank's K samples, shape (K,); with ``groups`` shape
      (K, 1 + number of groups), the first column being that of all parameters
    - ``sample_sizes`` (sequence of numbers, or Tensor): examples n_k behind each, shape (K,)
    - ``grad_sq_norm`` (Tensor): |ḡ|² of the mean over the samples of all ranks, shape () or (1 + number of groups,)

    As output of ``compute`` it returns a dict of scalar tensors: ``noise_scale``, ``noise_scale_lower``,
    ``noise_scale_upper``, ``grad_sq_norm``, ``cov_trace``, ``batch_size``; for a group, after its name and a slash.

    Args:
        ema_decay: Weight of the past per measurement, in [0, 1]; 1 is the plain mean.
        confidence: Level of the interval, in (0, 1).
        unit: What ``sample_sizes`` count. Only ``"examples"`` are independent of each other. Any other unit is a part
            of an example: then only different samples are, and the noise scale comes from pairs of them.
        groups: Names of the sets of parameters that are measured beside all of them.
        checksum_tolerance: Largest relative difference of checksums, where the samples carry them.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``ema_decay`` or ``confidence`` is out of range.

    Example:
        >>> metric = GradientNoiseScale(ema_decay=1.0)
        >>> for _ in range(3):
        ...     metric.update(torch.tensor([3.0, 3.0, 3.0, 3.0]), [32, 32, 32, 32], torch.tensor(1.5))
        >>> metric.compute()["noise_scale"]
        tensor(64., dtype=torch.float64)
    """

    full_state_update = True
    higher_is_better = None
    is_differentiable = False

    moments: Tensor
    counts: Tensor

    def __init__(
        self,
        *,
        ema_decay: float = 0.99,
        confidence: float = 0.95,
        unit: str = "examples",
        groups: Sequence[str] = (),
        checksum_tolerance: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_ema_decay(ema_decay)
        check_confidence(confidence)
        self.ema_decay = ema_decay
        self.confidence = confidence
        self.unit = unit
        self.groups = tuple(groups)
        self.checksum_tolerance = checksum_tolerance
        # on every rank alike after each synchronisation; shape (1 + groups, moments)
        columns = len(self._empty_moments.to_list())
        zeros = torch.zeros(1 + len(self.groups), columns, dtype=torch.float64)
        self.add_state("moments", zeros, dist_reduce_fx=_same_on_all_ranks, persistent=True)
        zeros = torch.zeros(_REJECTED + len(Rejection), dtype=torch.float64)
        self.add_state("counts", zeros, dist_reduce_fx=_same_on_all_ranks, persistent=True)
        # this rank's rows since then, shape (steps, columns of a row)
        zeros = torch.zeros(0, ROW_SIZE + COLUMNS_OF_SET * len(self.groups), dtype=torch.float64)
        self.add_state("pending", zeros, dist_reduce_fx="sum")

    def update(
        self,
        sample_sq_norms: Tensor,
        sample_sizes: Sequence[float] | Tensor,
        grad_sq_norm: Tensor,
        sample_weights: Sequence[float] | None = None,
    ) -> None:
        """Add one optimizer step.

        Args:
            sample_sq_norms: |g_k|² of this rank's samples, shape (K,) or (K, 1 + groups).
            sample_sizes: Examples n_k behind each sample, shape (K,).
            grad_sq_norm: |ḡ|² of the weighted mean gradient over all ranks' samples, shape () or (1 + groups,).
            sample_weights: Weights w_k of the samples in ḡ, shape (K,); equal by default.

        Raises:
            ValueError: If they do not have one entry a sample, or the norms not one a group.
        """
        count = len(sample_sq_norms)
        weights = [1.0] * count if sample_weights is None else sample_weights
        if not len(weights) == len(sample_sizes) == count:
            raise ValueError(
                f"`sample_sq_norms`, `sample_sizes` and `sample_weights` must have one entry a sample, got "
                f"{count}, {len(sample_sizes)} and {len(weights)}; pass equally many of each."
            )
        sets = 1 + len(self.groups)
        if (sample_sq_norms.numel(), grad_sq_norm.numel()) != (count * sets, sets):
            raise ValueError(
                f"`sample_sq_norms` and `grad_sq_norm` must have {sets} norms a sample, that of all parameters and one "
                f"for each of `groups={list(self.groups)}`, got shapes {tuple(sample_sq_norms.shape)} and "
                f"{tuple(grad_sq_norm.shape)}; pass (K, {sets}) and ({sets},)."
            )
        self.add_samples(
            GradientSamples(sq_norms=sample_sq_norms, sizes=sample_sizes, weights=weights, grad_sq_norm=grad_sq_norm)
        )

    def add_samples(self, samples: GradientSamples, *, rank: int = 0, ranks: int = 1) -> None:
        """Add one optimizer step as a probe gives it, checksums included.

        Args:
            samples: Of this rank.
            rank: Which of ``ranks`` this is, where each rank has a mean of its own samples alone.
            ranks: How many measurements the step then makes; the same on every rank.
        """
        row = samples.to_row()
        self._new_rows += [row if own == rank else torch.zeros_like(row) for own in range(ranks)]
        self._computed = None

    @property
    def pending(self) -> Tensor:
        """Rows that wait to be folded, shape (steps, columns of a row); they are put together when somebody asks."""
        if self._new_rows:
            rows = torch.stack(self._new_rows)
            self.pending = torch.cat((self._pending, rows)) if len(self._pending) else rows
        return self._pending

    @pending.setter
    def pending(self, rows: Tensor) -> None:
        self._pending = rows
        self._new_rows: list[Tensor] = []

    def compute(self) -> dict[str, Tensor]:
        """Return the smoothed statistics; across ranks it communicates, as every metric does.

        Raises:
            RuntimeError: If other ranks' samples are needed and synchronization is switched off.
        """
        if len(self.pending) and not self._is_synced and _world_size() > 1:
            raise RuntimeError(
                "`compute()` without synchronization sees only one rank's gradient samples; leave "
                "`sync_on_compute` on, or call `synchronize()` on every rank first."
            )
        moments, counts = self._folded()
        if not self._is_synced:
            self.moments, self.counts, self.pending = moments, counts, self.pending[:0]
        starts = ["", *(f"{group}/" for group in self.groups)]
        return {
            start + key: torch.tensor(value, dtype=torch.float64)
            for start, of_set in zip(starts, moments, strict=True)
            for key, value in self._estimate_from(of_set, counts).to_metrics().items()
        }

    def synchronize(self, *, across_ranks: bool | None = None) -> None:
        """Fold what was buffered into the moving averages, with a single all-reduce.

        Call it on every rank, after equally many updates; long distributed runs should call it every so
        often, since :meth:`compute` keeps the buffer.

        Args:
            across_ranks: Whether to add up the ranks' rows; by default, whenever torch.distributed runs.
        """
        synchronize_together([self], across_ranks=across_ranks)

    def estimate(
        self, group: str | None = None, *, probe: str = "", coverage: float = 1.0, approximate: bool = False
    ) -> NoiseScaleEstimate:
        """Return the estimate of all updates; on several ranks as of the last :meth:`synchronize`.

        Never communicates.

        Args:
            group: Which of ``groups``; None is all parameters.
            probe: Name of the probe, for the record.
            coverage: Measured share of the trainable parameters.
            approximate: Whether the probe is only approximate.

        Raises:
            ValueError: If there is no such group.
        """
        self._fold_alone()
        return self.last_estimate(group, probe=probe, coverage=coverage, approximate=approximate)

    def last_estimate(self, group: str | None = None, **known: Any) -> NoiseScaleEstimate:
        """Return :meth:`estimate` as of the last :meth:`synchronize`, which takes nothing from the device."""
        if group is not None and group not in self.groups:
            raise ValueError(f"`group` must be None or one of {list(self.groups)}, got {group!r}; None is the total.")
        moments = self.moments[0 if group is None else 1 + self.groups.index(group)]
        return self._estimate_from(moments, self.counts, **known)

    @property
    def num_measurements(self) -> int:
        """Optimizer steps that were measured and used, as of the last synchronisation or estimate."""
        return int(self._moments_from(self.moments[0]).count)

    @property
    def rejected(self) -> dict[Rejection, int]:
        """Optimizer steps that were measured but left out, by reason, as of the last synchronisation."""
        return {reason: int(self.counts[_REJECTED + reason]) for reason in Rejection}

    @property
    def weights_follow_sizes(self) -> bool:
        """Whether samples of guessed weights were found to be weighted by what they count."""
        return bool(self.counts[_BY_SIZES])

    @property
    def micro_batches_and_ranks(self) -> tuple[int, int]:
        """What makes up the estimate's batch size: micro-batches over all ranks, and ranks; zeros before any."""
        return int(self.counts[_MICRO_BATCHES]), int(self.counts[_RANKS])

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Moments and counts after the buffered rows; the buffer must hold the sum over ranks."""
        moments = [self._moments_from(values) for values in self.moments]
        counts = self.counts.tolist()
        for row in self.pending.tolist():
            result = self._measured(row, counts)
            if isinstance(result, Rejection):
                counts[_REJECTED + result] += 1
                continue
            if result.trend and not counts[_BY_SIZES]:
                for column, value in ((_TRENDS, 1.0), (_SUM_TREND, result.trend), (_SUM_TREND_2, result.trend**2)):
                    counts[column] += value
                if _rises(*counts[_TRENDS:_BY_SIZES]):
                    # what was measured under the other guess does not mix with it
                    counts[_BY_SIZES] = 1.0
                    moments = [self._empty_moments for _ in moments]
                    result = self._measured(row, counts)
                    assert isinstance(result, Measurement)
            moments = [self._updated(of_set, result, index) for index, of_set in enumerate(moments)]
            counts[_REPEATS] = result.repeats
            # short windows do not tell the batch size in use
            if result.full or not counts[_EXAMPLES]:
                counts[_EXAMPLES : _RANKS + 1] = result.examples, result.micro_batches, result.ranks
            if result.full:
                for column, value in ((_SUM_EXAMPLES, result.examples), (_SUM_MICRO_BATCHES, result.micro_batches)):
                    counts[column] = self.ema_decay * counts[column] + value
        return self.moments.new_tensor([m.to_list() for m in moments]), self.counts.new_tensor(counts)

    def _estimate_from(
        self, moments: Tensor, counts: Tensor, *, probe: str = "", coverage: float = 1.0, **known: Any
    ) -> NoiseScaleEstimate:
        batch_size = float(counts[_EXAMPLES])
        if self.unit != EXAMPLES and counts[_SUM_MICRO_BATCHES]:
            # parts differ from step to step; what the present number of micro-batches holds on average is in use
            batch_size = float(counts[_MICRO_BATCHES] * counts[_SUM_EXAMPLES] / counts[_SUM_MICRO_BATCHES])
        return NoiseScaleEstimate.from_moments(
            self._moments_from(moments),
            batch_size=batch_size,
            repeated=bool(counts[_REPEATS]),
            confidence=self.confidence,
            unit=self.unit,
            probe=probe,
            coverage=coverage,
            **known,
        )

    @property
    def _empty_moments(self) -> PairMoments | PartMoments:
        return PairMoments() if self.unit == EXAMPLES else PartMoments()

    def _moments_from(self, values: Tensor) -> PairMoments | PartMoments:
        return self._empty_moments.from_list(values.tolist())

    def _measured(self, row: Sequence[float], counts: Sequence[float]) -> Measurement | Rejection:
        parts, by_sizes = self.unit != EXAMPLES, bool(counts[_BY_SIZES])
        return measurement_from_row(row, self.checksum_tolerance, parts=parts, by_sizes=by_sizes)

    def _updated(
        self, moments: PairMoments | PartMoments, measured: Measurement, index: int
    ) -> PairMoments | PartMoments:
        """Return the moments of one set of parameters after a measurement; it may have no norms of that set."""
        if isinstance(moments, PartMoments):
            step = measured.part_measurements[index]
            return moments if step is None else moments.updated(step, self.ema_decay)
        pair = measured.pairs[index]
        return moments if pair is None else moments.updated(*pair, self.ema_decay)

    def _fold_alone(self) -> None:
        """Fold what waits where no other rank has a part in it."""
        if _world_size() == 1:
            self.synchronize(across_ranks=False)

    def fold_pending(self, summed: Tensor) -> None:
        """Fold rows into the moving averages that are already summed over the ranks; buffered ones are dropped."""
        self.pending = summed
        self.moments, self.counts = self._folded()
        self.pending = self.pending[:0]

    def plot(self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Any = None) -> Any:
        """Plot one result of :meth:`compute`, or several in order, as the noise scale with its interval.

        Args:
            val: One result, a sequence of them, or None for the present one.
            ax: A matplotlib axis to draw on; a new figure by default.

        Returns:
            The figure and the axis.

        Raises:
            ModuleNotFoundError: If matplotlib is missing; ``pip install "lightning-wn[plots]"`` brings it.
        """
        from lightning_wn.noise_scale.drawing import draw_noise_scale, figure_and_axis  # noqa: PLC0415 - optional

        results = [self.compute()] if val is None else [val] if isinstance(val, dict) else list(val)
        fig, ax = figure_and_axis(ax)
        columns = ("noise_scale", "noise_scale_lower", "noise_scale_upper", "batch_size")
        series = [[float(result[column]) for result in results] for column in columns]
        draw_noise_scale(ax, list(range(1, len(results) + 1)), *series, unit=self.unit)
        ax.set_xlabel("result")
        return fig, ax


def synchronize_together(metrics: Sequence[GradientNoiseScale], *, across_ranks: bool | None = None) -> None:
    """Synchronise several metrics with a single all-reduce; see :meth:`GradientNoiseScale.synchronize`."""
    waiting = [metric for metric in metrics if len(metric.pending)]
    if not waiting:
        return
    rows = [metric.pending for metric in waiting]
    if _world_size() > 1 if across_ranks is None else across_ranks:
        flat = torch.cat([pending.flatten() for pending in rows])
        torch.distributed.all_reduce(flat, group=waiting[0].process_group)
        parts = torch.split(flat, [pending.numel() for pending in rows])
        rows = [part.reshape(pending.shape) for part, pending in zip(parts, rows, strict=True)]
    for metric, summed in zip(waiting, rows, strict=True):
        metric.fold_pending(summed)


def _rises(count: float, total: float, squares: float) -> bool:
    """Whether the mean of so many numbers, of this sum and sum of squares, is positive beyond doubt."""
    if count < _LEAST_TRENDS or total <= count * _LEAST_TREND:
        return False
    mean = total / count
    variance = max(squares / count - mean * mean, 0.0) * count / (count - 1.0)
    return mean > _SURE * math.sqrt(variance / count)


def check_ema_decay(ema_decay: float) -> None:
    """Raise ValueError unless ``ema_decay`` lies in [0, 1]."""
    if isinstance(ema_decay, bool) or not 0.0 <= ema_decay <= 1.0:
        raise ValueError(
            f"`ema_decay` must lie in [0, 1], got {ema_decay!r}; 0.99 smooths over about 100 measurements and "
            "1 is the plain mean."
        )
