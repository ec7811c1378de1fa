"""When to distrust a suggested batch size, and how much more to measure."""

from __future__ import annotations

import math

from lightning_wn.batch_size.advice_text import at_least
from lightning_wn.batch_size.precision import decay_for, measurements_for, relative_half_width
from lightning_wn.batch_size.run import ObservedRun
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.text import format_count

_WISHED_HALF_WIDTH = 0.2
_WARM_UP_STEPS = 100
_WARM_UP_SHARE = 0.05
_LARGE_SHARE_OF_EPOCH = 0.2
_SKEWED = 1.0


def doubts_about(
    estimate: NoiseScaleEstimate, run: ObservedRun, *, suggested: float, units_per_epoch: float
) -> tuple[str, ...]:
    """Return one sentence for each reason to distrust a suggestion; none is a good sign.

    The suggested batch size is in the estimate's unit, and so is what an epoch holds: infinite where it has no end, NaN
    where nobody knows.
    """
    reasons = []
    if estimate.unchecked:
        reasons.append(
            f"Examples could not be checked for mixing ({estimate.unchecked}): where one example's loss depends on "
            "others, as with statistics of the batch, this noise scale is wrong."
        )
    if estimate.repeated:
        reasons.append(
            "Every measurement was of the same examples, as where one step holds all data: what the noise scale of "
            "others would be is not known, however often these are measured."
        )
    elif not estimate.is_resolved:
        reasons.append(
            "Not sure yet: |G|² cannot be told from zero, so the noise scale may be far larger; measure more."
            + at_least(estimate)
        )
    elif suggested >= 8 * estimate.batch_size:
        reasons.append("That is far from where it was measured: go part of the way and measure again.")
    elif suggested != estimate.batch_size and estimate.upper > 2.0 * estimate.lower:
        reasons.append("The interval is still wide: measure more steps before a large change.")
    if estimate.skewness > _SKEWED:
        reasons.append(
            "The measurements have a heavy tail: a few of them are far above the others, and rare examples with large "
            "gradients may be missing; the interval then holds the truth less often than it says, and ends too low "
            "(docs/statistics.md has how often)."
        )
    if _is_warming_up(run):
        reasons.append(
            f"Training has just begun ({run.num_steps} steps): the noise scale usually grows as the loss falls."
        )
    elif 0.0 < estimate.num_measurements * (1.0 - run.ema_decay) < 1.0:
        reasons.append(
            f"The average still holds the beginning of training ({estimate.num_measurements} measurements at "
            f"ema_decay={run.ema_decay:g}), where |G|² is usually larger, and then reads too low; a shorter "
            "`half_life_steps` forgets sooner."
        )
    if run.learning_rate_rises and not _is_warming_up(run):
        reasons.append(
            "The learning rate is still rising, and the noise scale goes with it: ask again after the warm-up."
        )
    if estimate.coverage < 1.0:
        reasons.append(f"Only {estimate.coverage:.0%} of the parameters were measured.")
    if suggested > _LARGE_SHARE_OF_EPOCH * units_per_epoch:
        reasons.append(
            f"That is {suggested / units_per_epoch:.0%} of an epoch ({format_count(units_per_epoch)} {estimate.unit}): "
            "batches that near to the whole data set are less noisy than the noise scale assumes."
        )
    if estimate.approximate:
        reasons.append(
            "Approximate: it compares successive steps, and a large learning rate makes the noise scale look "
            "larger or infinite; `Trainer(accumulate_grad_batches=2)` or more measures exactly."
        )
    return tuple(reasons)


def more_to_measure(estimate: NoiseScaleEstimate, run: ObservedRun) -> str:
    """Say how many more steps narrow the interval to ±20 %; empty where it is narrow enough, or says nothing."""
    if math.isnan(run.ema_decay):
        return ""
    present = relative_half_width(estimate.noise_scale, estimate.lower, estimate.upper)
    more = measurements_for(_WISHED_HALF_WIDTH, present, estimate.num_measurements, run.ema_decay)
    if math.isnan(more) or more == 0:
        return ""
    now = f"now ±{present:.0%}".replace("%", " %")
    if math.isinf(more):
        decay = decay_for(_WISHED_HALF_WIDTH, present, estimate.num_measurements, run.ema_decay)
        half_life = round(run.every_n_steps * math.log(0.5) / math.log(decay))
        return (
            f"The average is too short for ±20 % ({now}): give it ema_decay={decay:g} or half_life_steps={half_life}."
        )
    cadence = f"every_n_steps={run.every_n_steps}; " if run.every_n_steps > 1 else ""
    return f"Measure about {format_count(more * run.every_n_steps)} more optimizer steps for ±20 % ({cadence}{now})."


def _is_warming_up(run: ObservedRun) -> bool:
    if run.num_steps is None:
        return False
    share = run.num_steps / run.planned_steps if run.planned_steps else 1.0
    few = run.num_steps < _WARM_UP_STEPS
    return (few or share < _WARM_UP_SHARE) if math.isfinite(run.planned_steps) else few
