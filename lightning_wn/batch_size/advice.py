"""From an estimate and the run's configuration to a suggestion in words and numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning_wn.batch_size.tradeoff import (
    adam_learning_rate_factor,
    examples_cost,
    sgd_learning_rate_factor,
    steps_cost,
)
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate, format_count


@dataclass(frozen=True, kw_only=True)
class RunConfiguration:
    """What makes up the batch size of a run.

    Attributes:
        accumulate_grad_batches: Micro-batches per optimizer step on each rank.
        num_ranks: Data-parallel ranks.
    """

    accumulate_grad_batches: int = 1
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class BatchSizeAdvice:
    """A batch size to try, what it changes, and how sure that is. ``print(advice)`` reads well.

    Attributes:
        estimate: The estimate behind the advice.
        configuration: The run that was measured.
        suggested_batch_size: Reachable batch size nearest to the noise scale, in the estimate's unit;
            there training takes twice the fewest possible steps and twice the fewest possible examples.
            NaN where the noise scale is not known or infinite.
        suggested_accumulate_grad_batches: ``accumulate_grad_batches`` that gives it on the same ranks; 0
            where there is no suggestion.
        steps_factor: Optimizer steps to the same loss, suggested over present.
        examples_factor: Examples to the same loss, suggested over present.
        sgd_learning_rate_factor: Factor on the learning rate of SGD.
        adam_learning_rate_factor: Factor on the learning rate of Adam-like optimizers.
    """

    estimate: NoiseScaleEstimate
    configuration: RunConfiguration
    suggested_batch_size: float
    suggested_accumulate_grad_batches: int
    steps_factor: float
    examples_factor: float
    sgd_learning_rate_factor: float
    adam_learning_rate_factor: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, nested as the attributes are."""
        return asdict(self)

    def __str__(self) -> str:
        """A short text for people."""
        estimate, unit = self.estimate, self.estimate.unit
        if not estimate.num_measurements:
            return "No advice on the batch size: the noise scale was not measured yet."
        lines = [str(estimate)[0].upper() + str(estimate)[1:] + "."]
        if not self.suggested_accumulate_grad_batches:
            lines.append("No advice on the batch size: |G|² is not above zero yet; measure more steps.")
            return "\n".join(lines)
        old, new = self.configuration.accumulate_grad_batches, self.suggested_accumulate_grad_batches
        size = format_count(self.suggested_batch_size)
        micro_batch = estimate.batch_size / (old * self.configuration.num_ranks)
        if new == old:
            lines.append(f"Keep the batch size: {size} {unit} is the reachable size nearest to the noise scale.")
        else:
            lines.append(
                f"Try a batch size of {size} {unit}: accumulate_grad_batches={new} instead of {old}. To the same "
                f"loss that is about {_change(self.steps_factor, 'steps')} and "
                f"{_change(self.examples_factor, unit)}; learning rate x{self.sgd_learning_rate_factor:.2g} "
                f"for SGD, x{self.adam_learning_rate_factor:.2g} for Adam."
            )
        smallest = micro_batch * self.configuration.num_ranks
        if estimate.noise_scale < 0.7 * smallest:
            per_rank = max(1.0, estimate.noise_scale / self.configuration.num_ranks)
            lines.append(
                f"The noise scale is below one micro-batch per rank ({format_count(smallest)} {unit} in all): "
                f"a micro-batch near {format_count(per_rank)} would come closer."
            )
        if not estimate.is_resolved:
            lines.append(
                "Not sure yet: |G|² cannot be told from zero, so the noise scale may be far larger; measure more."
            )
        elif estimate.upper > 2.0 * estimate.lower:
            lines.append("The interval is still wide: measure more steps before a large change.")
        return "\n".join(lines)


def advise_batch_size(estimate: NoiseScaleEstimate, configuration: RunConfiguration) -> BatchSizeAdvice:
    """Suggest the reachable batch size nearest to the noise scale.

    Reachable are whole multiples of one micro-batch on every rank.

    Args:
        estimate: The measured noise scale.
        configuration: Accumulation and ranks while it was measured.

    Returns:
        The advice; without a suggestion where the noise scale is NaN or infinite.

    Example:
        >>> estimate = NoiseScaleEstimate(
        ...     grad_sq_norm=0.05, cov_trace=6.4, noise_scale=128.0, lower=110.0, upper=150.0, batch_size=32.0,
        ...     num_measurements=400, coverage=1.0, unit="examples", probe="micro_batch", confidence=0.95)
        >>> print(advise_batch_size(estimate, RunConfiguration(accumulate_grad_batches=2)))
        Noise scale 128 examples (95 % interval 110 to 150; 400 measurements, batch size 32).
        Try a batch size of 128 examples: accumulate_grad_batches=8 instead of 2. To the same loss that is \
about 2.5x fewer steps and 1.6x the examples; learning rate x2.5 for SGD, x1.6 for Adam.
    """
    noise_scale, present = estimate.noise_scale, estimate.batch_size
    if not math.isfinite(noise_scale) or not present > 0:
        suggested, accumulate = math.nan, 0
        factors = (math.nan,) * 4
    else:
        unit = present / configuration.accumulate_grad_batches
        accumulate = max(1, round(noise_scale / unit))
        suggested = accumulate * unit
        factors = (
            steps_cost(suggested, noise_scale) / steps_cost(present, noise_scale),
            _ratio(examples_cost(suggested, noise_scale), examples_cost(present, noise_scale)),
            sgd_learning_rate_factor(present, suggested, noise_scale),
            adam_learning_rate_factor(present, suggested, noise_scale),
        )
    return BatchSizeAdvice(
        estimate=estimate,
        configuration=configuration,
        suggested_batch_size=suggested,
        suggested_accumulate_grad_batches=accumulate,
        steps_factor=factors[0],
        examples_factor=factors[1],
        sgd_learning_rate_factor=factors[2],
        adam_learning_rate_factor=factors[3],
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if math.isfinite(denominator) else math.nan


def _change(factor: float, what: str) -> str:
    """Say "2.5x fewer steps" or "1.6x the examples".

    Example:
        >>> _change(0.4, "steps"), _change(1.6, "examples")
        ('2.5x fewer steps', '1.6x the examples')
    """
    return f"{factor:.2g}x the {what}" if factor >= 1.0 else f"{1.0 / factor:.2g}x fewer {what}"
