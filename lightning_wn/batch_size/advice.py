"""From an estimate and the run's configuration to a suggestion in words and numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning_wn.batch_size.tradeoff import (
    adam_learning_rate_factor,
    examples_factor,
    sgd_learning_rate_factor,
    steps_factor,
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
        estimate = self.estimate
        if not estimate.num_measurements:
            return "No advice on the batch size: the noise scale was not measured yet."
        lines = [str(estimate)[0].upper() + str(estimate)[1:] + "."]
        if self.suggested_accumulate_grad_batches:
            lines += [self._suggestion(), self._smaller_micro_batch(), self._doubt()]
        else:
            lines += ["No advice on the batch size: |G|² is not above zero yet; measure more steps.", self._at_least()]
        if estimate.approximate:
            lines.append(
                "Approximate: it compares successive steps, and a large learning rate makes the noise scale look "
                "larger or infinite; `Trainer(accumulate_grad_batches=2)` or more measures exactly."
            )
        return "\n".join(line for line in lines if line)

    def _suggestion(self) -> str:
        old, new = self.configuration.accumulate_grad_batches, self.suggested_accumulate_grad_batches
        size, unit = format_count(self.suggested_batch_size), self.estimate.unit
        if new == old:
            return f"Keep the batch size: {size} {unit} is the reachable size nearest to the noise scale."
        return (
            f"{'Try' if self.estimate.is_resolved else 'A first guess, to be confirmed:'} a batch size of {size} "
            f"{unit}: accumulate_grad_batches={new} instead of {old}. To the same "
            f"loss that is about {_change(self.steps_factor, 'steps')} and "
            f"{_change(self.examples_factor, unit)}; learning rate x{self.sgd_learning_rate_factor:.2g} "
            f"for SGD, x{self.adam_learning_rate_factor:.2g} for Adam."
        )

    def _smaller_micro_batch(self) -> str:
        """Say how to get below one micro-batch on every rank, which accumulation cannot."""
        estimate, ranks = self.estimate, self.configuration.num_ranks
        smallest = estimate.batch_size / self.configuration.accumulate_grad_batches
        if estimate.noise_scale >= 0.7 * smallest:
            return ""
        # one device measures with two micro-batches or more
        accumulate = 2 if ranks == 1 else 1
        micro_batch = max(1, round(estimate.noise_scale / (accumulate * ranks)))
        return (
            f"The noise scale is below one micro-batch per rank ({format_count(smallest)} {estimate.unit} in all): "
            f"micro-batches of about {format_count(micro_batch)} with accumulate_grad_batches={accumulate} would "
            "come closer."
        )

    def _doubt(self) -> str:
        if not self.estimate.is_resolved:
            doubt = "Not sure yet: |G|² cannot be told from zero, so the noise scale may be far larger; measure more."
            return f"{doubt} {self._at_least()}".rstrip()
        old, new = self.configuration.accumulate_grad_batches, self.suggested_accumulate_grad_batches
        if new >= 8 * old:
            return "That is far from where it was measured: go part of the way and measure again."
        if new != old and self.estimate.upper > 2.0 * self.estimate.lower:
            return "The interval is still wide: measure more steps before a large change."
        return ""

    def _at_least(self) -> str:
        lower, unit = self.estimate.lower, self.estimate.unit
        return f"The noise scale is probably above {format_count(lower)} {unit}." if 0.0 < lower < math.inf else ""


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
            steps_factor(present, suggested, noise_scale),
            examples_factor(present, suggested, noise_scale),
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


def _change(factor: float, what: str) -> str:
    """Say "2.5x fewer steps", "1.6x the examples" or "as many steps".

    Example:
        >>> _change(0.4, "steps"), _change(1.6, "examples"), _change(0.99, "steps")
        ('2.5x fewer steps', '1.6x the examples', 'as many steps')
    """
    times = f"{max(factor, 1.0 / factor):.2g}x"
    if times == "1x":
        return f"as many {what}"
    return f"{times} the {what}" if factor > 1.0 else f"{times} fewer {what}"
