"""From branches at several batch sizes to the critical batch size; plain numbers, no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lightning_wn.batch_size.tradeoff import Factor
from lightning_wn.noise_scale.statistics import student_t_quantile

_GRID = 400
_REACH = 1e4


@dataclass(frozen=True, kw_only=True)
class TradeoffFit:
    """The law S = S_min (1 + B_crit/B), fitted to the optimizer steps that branches took to the same loss.

    Attributes:
        critical_batch_size: B_crit with its interval; 0 or infinite at an end that the branches do not settle.
        min_steps: S_min, optimizer steps with an infinite batch.
        min_examples: E_min = S_min · B_crit, examples with batches of one.
        residual: Root mean square of log(S) around the law: 0.1 is about 10 %.
    """

    critical_batch_size: Factor
    min_steps: float
    min_examples: float
    residual: float

    def steps(self, batch_size: float) -> float:
        """Return the law's optimizer steps at a batch size."""
        return self.min_steps + self.min_examples / batch_size


def fit_tradeoff(batch_sizes: Sequence[float], steps: Sequence[float], confidence: float = 0.95) -> TradeoffFit:
    """Fit S = S_min (1 + B_crit/B) (arXiv 1812.06162, equation 2.11) by least squares in log(S).

    The interval is of the profile kind: all B_crit whose best S_min brings the sum of squares within an F quantile of
    the least. It has no end where the branches do not settle it: where all took the same steps, or all the same
    examples.

    Args:
        batch_sizes: Examples in an optimizer step, positive; each may come several times.
        steps: Optimizer steps to the target loss, positive and finite.
        confidence: Level of the interval.

    Raises:
        ValueError: If there are fewer than three different batch sizes.

    Example:
        >>> sizes = [2, 8, 32, 128]
        >>> fit = fit_tradeoff(sizes, [50 * (1 + 20 / size) for size in sizes])
        >>> round(fit.critical_batch_size.value, 2), round(fit.min_steps, 2)
        (20.0, 50.0)
    """
    if len(set(batch_sizes)) < 3:
        raise ValueError(
            f"Fitting S = S_min (1 + B_crit/B) takes three batch sizes that reached the target loss, got "
            f"{len(set(batch_sizes))}; raise `num_examples` or `target_loss`, or add to `batch_sizes`."
        )
    logs = [math.log(step) for step in steps]

    def deviations(critical: float) -> list[float]:
        shapes = [_log_shape(size, critical) for size in batch_sizes]
        level = fmean(y - x for x, y in zip(shapes, logs, strict=True))
        return [y - x - level for x, y in zip(shapes, logs, strict=True)]

    def misfit(critical: float) -> float:
        return sum(deviation**2 for deviation in deviations(critical))

    low, high = min(batch_sizes) / _REACH, max(batch_sizes) * _REACH
    grid = [low * (high / low) ** (i / _GRID) for i in range(_GRID + 1)]
    best = min(range(_GRID + 1), key=lambda i: misfit(grid[i]))
    critical = _least(misfit, grid[max(best - 1, 0)], grid[min(best + 1, _GRID)])
    if best in (0, _GRID):
        critical = 0.0 if best == 0 else math.inf
    least, freedom = misfit(critical), len(steps) - 2
    # rounding alone leaves this much
    limit = least * (1.0 + student_t_quantile(confidence, freedom) ** 2 / freedom) + 1e-18
    lower = 0.0 if misfit(0.0) <= limit else _crossing(misfit, limit, critical, low)
    upper = math.inf if misfit(math.inf) <= limit else _crossing(misfit, limit, critical, high)
    shapes = [_log_shape(size, critical) for size in batch_sizes]
    level = math.exp(fmean(y - x for x, y in zip(shapes, logs, strict=True)))
    # where only one of the two terms is there, the level is that term's
    min_steps, min_examples = (0.0, level) if math.isinf(critical) else (level, level * critical)
    return TradeoffFit(
        critical_batch_size=Factor(critical, lower, upper),
        min_steps=min_steps,
        min_examples=min_examples,
        residual=math.sqrt(least / len(steps)),
    )


@dataclass(frozen=True, kw_only=True)
class Excess:
    """How much more loss a batch size ends with than the smallest one.

    Attributes:
        batch_size: Examples in an optimizer step.
        value: Smoothed loss, minus that at the smallest batch size after the same examples.
        error: Its standard error; NaN where there is one value alone.
        margin: Half the width of its interval; NaN where there is one value alone.
    """

    batch_size: float
    value: float
    error: float
    margin: float


def loss_excess(batch_size: float, differences: Sequence[float], confidence: float = 0.95) -> Excess:
    """Return the mean of paired differences, with its interval."""
    value = fmean(differences)
    if len(differences) < 2 or not math.isfinite(value):
        return Excess(batch_size=batch_size, value=value, error=math.nan, margin=math.nan)
    error = stdev(differences) / math.sqrt(len(differences))
    margin = error * student_t_quantile(confidence, len(differences) - 1)
    return Excess(batch_size=batch_size, value=value, error=error, margin=margin)


def largest_within(excesses: Sequence[Excess], tolerance: float) -> Factor:
    """Return the largest batch size whose loss is within the tolerance of the smallest one's (arXiv 2505.23971).

    Its interval goes from the last batch size before the first that may be outside, as far as the losses' intervals
    tell, to the first one from which on all are surely outside: infinite where the largest is not.

    Args:
        excesses: By batch size, the smallest first.
        tolerance: In the unit of the loss.
    """

    def margin(excess: Excess) -> float:
        return excess.margin if math.isfinite(excess.margin) else 0.0

    # a branch that diverged has an infinite loss
    value = max(excess.batch_size for excess in excesses if excess.value <= tolerance)
    lower = excesses[0].batch_size
    for excess in excesses[1:]:
        if not excess.value + margin(excess) <= tolerance:
            break
        lower = excess.batch_size
    upper = math.inf
    for excess in reversed(excesses):
        if excess.value - margin(excess) <= tolerance:
            break
        upper = excess.batch_size
    return Factor(value, min(lower, value), upper)


def mean_noise_scale(noise_scales: Sequence[float], batch_size: float, weights: Sequence[float]) -> float:
    r"""Return the average of the noise scale along a run that predicts B_crit = E_min/S_min.

    With dt optimizer steps at noise scale N, training gets as far as ds = dt / (1 + N/B) steps of an infinite batch.
    S_min = ∫ds and E_min = ∫N ds (arXiv 1812.06162, section 2.3), so that N counts by ds.

    Args:
        noise_scales: Along the run; an infinite one counts by its limit.
        batch_size: B, in the same unit.
        weights: Optimizer steps for which each held.

    Example:
        >>> mean_noise_scale([10.0, 30.0], 10.0, [1.0, 1.0])  # weights 1/2 and 1/4
        16.666666666666668
    """
    examples = steps = 0.0
    for noise_scale, weight in zip(noise_scales, weights, strict=True):
        if math.isnan(noise_scale):
            continue
        share = 0.0 if math.isinf(noise_scale) else 1.0 / (1.0 + noise_scale / batch_size)
        steps += weight * share
        examples += weight * batch_size * (1.0 - share)
    if not steps + examples:
        return math.nan
    return examples / steps if steps else math.inf


def _log_shape(size: float, critical: float) -> float:
    """Return log(S) but for a constant."""
    return -math.log(size) if math.isinf(critical) else math.log1p(critical / size)


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function of a positive number is least, by thirds on a log scale."""
    for _ in range(100):
        step = (high / low) ** (1 / 3)
        if function(low * step) <= function(high / step):
            high /= step
        else:
            low *= step
    return math.sqrt(low * high)


def _crossing(function: Callable[[float], float], limit: float, inside: float, outside: float) -> float:
    """Return where the function crosses the limit, by halves on a log scale."""
    if function(outside) <= limit:  # beyond all reach
        return outside
    inside = max(min(inside, 1e300), 1e-300)
    for _ in range(100):
        middle = math.sqrt(inside * outside)
        if function(middle) <= limit:
            inside = middle
        else:
            outside = middle
    return math.sqrt(inside * outside)
