"""From trained branches to the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, geometric_mean, median

from lightning_wn.critical_batch_size.analysis import (
    Excess,
    TradeoffFit,
    fit_tradeoff,
    largest_within,
    loss_excess,
    mean_noise_scale,
)
from lightning_wn.critical_batch_size.branch import Branch
from lightning_wn.critical_batch_size.experiment import Sweep, Target
from lightning_wn.critical_batch_size.result import CriticalBatchSizeMeasurement, MeasuredBatchSize

_LAST_SHARE = 0.25
"""The smoothed loss at the end of a branch is the mean over the last quarter of its examples."""
_BINS = 10
_FEW_STEPS = 20
_SHORT = 0.95


def conclude(
    chosen: Mapping[int, Sequence[Branch]], sweep: Sweep, target: Target, at_edge: Sequence[int] = ()
) -> CriticalBatchSizeMeasurement:
    """Make the result of the branches at each batch size's best learning rate.

    Args:
        chosen: The branches of all seeds, by batch size, the smallest first.
        sweep: What was to be trained.
        target: What the branches are judged by.
        at_edge: Batch sizes whose best learning rate was the last that was tried.
    """
    excesses = _excesses(chosen, target.confidence) if target.loss is None else {}
    rows = [
        _row(size, branches, target.loss, excesses.get(size), sweep.rule_factor(size))
        for size, branches in chosen.items()
    ]
    fit: TradeoffFit | None = None
    if target.loss is None:
        critical = largest_within(list(excesses.values()), target.tolerance)
        tuned = sweep.tune_learning_rate is not None
        notes = _notes_on_excess(rows, critical.value, target.tolerance, tuned=tuned)
    else:
        fit = _fit(chosen, target.loss, target.confidence)
        critical = fit.critical_batch_size
        notes = _notes_on_steps(rows)
    return CriticalBatchSizeMeasurement(
        method=target.method,
        critical_batch_size=critical.value,
        lower=critical.lower,
        upper=critical.upper,
        confidence=target.confidence,
        batch_sizes=tuple(rows),
        predicted=_predicted(rows),
        fit=fit,
        tolerance=target.tolerance if target.loss is None else math.nan,
        target_loss=math.nan if target.loss is None else target.loss,
        unit=target.unit,
        notes=(*notes, *_notes_on_branches(rows, at_edge)),
    )


def _predicted(rows: Sequence[MeasuredBatchSize]) -> float:
    """Return the noise scale where somebody who follows it would end: at the batch size nearest to its own."""
    told = [row for row in rows if 0 < row.noise_scale < math.inf]
    if not told:
        return math.nan
    return min(told, key=lambda row: abs(math.log(row.noise_scale / row.mean_batch_size))).noise_scale


def _notes_on_excess(rows: Sequence[MeasuredBatchSize], critical: float, tolerance: float, *, tuned: bool) -> list[str]:
    notes = []
    if critical == rows[-1].batch_size:
        notes.append(f"The largest batch size was still as good: try more than {rows[-1].batch_size}.")
    outside = [row.batch_size for row in rows if not row.excess <= tolerance]
    if outside and outside[0] < critical:
        advice = "the losses are noisy; try more `seeds`"
        if not tuned:
            advice += ", and `tune_learning_rate=2.0`, as the learning rate may not go with the batch size"
        notes.append(f"Batch size {outside[0]} was worse than {critical:g}, which is larger: {advice}.")
    return notes


def _notes_on_steps(rows: Sequence[MeasuredBatchSize]) -> list[str]:
    notes = []
    missed = [row.batch_size for row in rows if math.isinf(row.steps)]
    if missed:
        notes.append(f"The target loss was not reached at batch size {_listed(missed)}, which the fit leaves out.")
    few = [row.batch_size for row in rows if row.steps < _FEW_STEPS]
    if few:
        notes.append(f"So few steps are a rough measure: batch size {_listed(few)}.")
    return notes


def _notes_on_branches(rows: Sequence[MeasuredBatchSize], at_edge: Sequence[int]) -> list[str]:
    notes = []
    if at_edge:
        notes.append(f"Of the learning rates that were tried, the last was the best at batch size {_listed(at_edge)}.")
    short = [row.batch_size for row in rows if row.mean_batch_size < _SHORT * row.batch_size]
    if short:
        notes.append(
            f"Epochs end with short batches or windows at batch size {_listed(short)}; their mean size is used. "
            "`drop_last=True` in the DataLoader avoids it."
        )
    return notes


def _excesses(chosen: Mapping[int, Sequence[Branch]], confidence: float) -> dict[int, Excess]:
    """Return how much more loss each batch size ends with: differences over the same examples, part by part."""
    smallest = next(iter(chosen))
    if any(branch.diverged for branch in chosen[smallest]):
        raise ValueError(
            f"Training diverged at the smallest batch size, {smallest}, with which the others are compared; lower the "
            "model's learning rate."
        )
    whole = [branch for branches in chosen.values() for branch in branches if not branch.diverged]
    end = min(branch.curve.examples[-1] for branch in whole)
    bins = max(1, min(_BINS, int(_LAST_SHARE * end / max(branch.mean_batch_size for branch in whole))))
    edges = [end * (1.0 - _LAST_SHARE * (1.0 - i / bins)) for i in range(bins + 1)]

    def ends(branches: Sequence[Branch]) -> list[float]:
        return [loss for branch in branches for loss in _end_losses(branch, edges)]

    first = ends(chosen[smallest])
    return {
        size: loss_excess(size, [x - y for x, y in zip(ends(branches), first, strict=True)], confidence)
        for size, branches in chosen.items()
    }


def _end_losses(branch: Branch, edges: Sequence[float]) -> list[float]:
    if branch.diverged:
        return [math.inf] * (len(edges) - 1)
    if not branch.smoothing:  # a monitored value has its own average over the validation data
        return [branch.curve.losses[-1]]
    return branch.curve.means(edges)


def _fit(chosen: Mapping[int, Sequence[Branch]], target_loss: float, confidence: float) -> TradeoffFit:
    reached = [
        (branch.mean_batch_size, steps)
        for branches in chosen.values()
        for branch in branches
        if math.isfinite(steps := branch.steps_to(target_loss))
    ]
    return fit_tradeoff([size for size, _ in reached], [steps for _, steps in reached], confidence)


def _row(
    size: int, branches: Sequence[Branch], target_loss: float | None, excess: Excess | None, rate: float
) -> MeasuredBatchSize:
    trained = [branch for branch in branches if branch.curve.steps]
    mean = fmean(branch.mean_batch_size for branch in trained) if trained else math.nan
    steps = [
        branch.steps_to(target_loss) if target_loss is not None else float(sum(branch.curve.steps[-1:]))
        for branch in branches
    ]
    total = _typical(steps)
    return MeasuredBatchSize(
        batch_size=size,
        mean_batch_size=mean,
        learning_rate_factor=branches[0].plan.learning_rate_factor * rate,
        steps=total,
        examples=total * mean,
        loss=fmean(_final_loss(branch) for branch in branches),
        excess=math.nan if excess is None else excess.value,
        excess_error=math.nan if excess is None else excess.error,
        noise_scale=_noise_scale(branches, steps),
    )


def _noise_scale(branches: Sequence[Branch], ends: Sequence[float]) -> float:
    """Return the mean noise scale until each branch's end, and of these the median over the seeds."""
    found = []
    for branch, end in zip(branches, ends, strict=True):
        points = [(step, value) for step, value in branch.noise_scales if step <= end] or branch.noise_scales[:1]
        if points:
            steps = [step for step, _ in points]
            weights = [after - before for before, after in pairwise([0, *steps])]
            found.append(mean_noise_scale([value for _, value in points], branch.mean_batch_size, weights))
    return median(found) if found else math.nan


def cost(branches: Sequence[Branch], target_loss: float | None) -> float:
    """Return what a learning rate is judged by, the less the better: steps to the target, or the loss at the end."""
    if target_loss is None:
        return fmean(_final_loss(branch) for branch in branches)
    steps = [branch.steps_to(target_loss) for branch in branches]
    return _typical(steps)


def _typical(steps: Sequence[float]) -> float:
    """Return the geometric mean; infinite where a branch did not get there, or took no step."""
    if not all(0 < count < math.inf for count in steps):
        return math.inf
    return steps[0] if len(set(steps)) == 1 else geometric_mean(steps)


def _final_loss(branch: Branch) -> float:
    if branch.diverged or not branch.curve.steps:
        return math.inf
    end = branch.curve.examples[-1]
    return fmean(_end_losses(branch, [end * (1.0 - _LAST_SHARE), end]))


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
