"""From an estimate and the run's configuration to a suggestion in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_wn.arguments import is_between
from lightning_wn.batch_size.advice_text import (
    LEARNING_RATE_MATTERS,
    MOMENTUM_MATTERS,
    assumptions,
    change,
    costs,
    no_suggestion,
    smaller_micro_batch,
    times_noise_scale,
    way_there,
)
from lightning_wn.batch_size.candidates import (
    Candidate,
    candidate_columns,
    candidate_table,
    make_candidate,
    reachable_sizes,
)
from lightning_wn.batch_size.caveats import doubts_about, more_to_measure
from lightning_wn.batch_size.learning_rate import OptimizerFamily, learning_rate_factor
from lightning_wn.batch_size.run import ObservedRun, RunConfiguration
from lightning_wn.batch_size.tradeoff import Factor, carry_interval, check_target
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.text import format_count

__all__ = ["BatchSizeAdvice", "RunConfiguration", "advise_batch_size"]

_UNKNOWN = Factor(math.nan, math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class BatchSizeAdvice:
    """A batch size to try, what it changes, and how sure that is. ``print(advice)`` reads well.

    Attributes:
        estimate: The estimate behind the advice.
        configuration: The run that was measured.
        run: What else was seen of the run.
        target: θ, the wished batch size over the noise scale. Training at θ times the noise scale takes 1 + θ times
            the fewest possible examples and 1 + 1/θ times the fewest possible steps.
        suggested_batch_size: Reachable batch size nearest to θ times the noise scale, in the estimate's unit.
            NaN where the noise scale is not known or infinite.
        suggested_accumulate_grad_batches: ``accumulate_grad_batches`` that gives it on the same ranks; 0
            where there is no suggestion or the present one is not known.
        suggested_num_ranks: Ranks that give it with the present ``accumulate_grad_batches``; 0 where none do.
        steps: Optimizer steps to the same loss, suggested over present, with the interval.
        examples: Examples to the same loss, suggested over present, with the interval.
        learning_rate: The factor on the learning rate of the run's own optimizer, with its interval; None where it
            is like neither SGD nor Adam.
        candidates: Other batch sizes that accumulation reaches, from a quarter to 16 times the present one.
        more_ranks: The larger ones of them on more ranks instead, if data parallelism is perfect.
        doubts: Reasons to distrust the suggestion.
    """

    estimate: NoiseScaleEstimate
    configuration: RunConfiguration
    run: ObservedRun
    target: float
    suggested_batch_size: float = math.nan
    suggested_accumulate_grad_batches: int = 0
    suggested_num_ranks: int = 0
    steps: Factor = _UNKNOWN
    examples: Factor = _UNKNOWN
    learning_rate: Factor | None = None
    candidates: tuple[Candidate, ...] = ()
    more_ranks: tuple[Candidate, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def steps_factor(self) -> float:
        """The value of ``steps`` alone."""
        return self.steps.value

    @property
    def examples_factor(self) -> float:
        """The value of ``examples`` alone."""
        return self.examples.value

    @property
    def sgd_learning_rate_factor(self) -> float:
        """Factor on the learning rate of SGD."""
        return self._learning_rate_factor("sgd")

    @property
    def adam_learning_rate_factor(self) -> float:
        """Factor on the learning rate of Adam-like optimizers."""
        return self._learning_rate_factor("adam")

    def _learning_rate_factor(self, family: OptimizerFamily) -> float:
        estimate = self.estimate
        return learning_rate_factor(family, estimate.batch_size, self.suggested_batch_size, estimate.noise_scale)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and None, nested as the attributes are; None is also not finite."""
        names = ("steps_factor", "examples_factor", "sgd_learning_rate_factor", "adam_learning_rate_factor")
        plain: dict[str, Any] = _plain(asdict(self) | {name: getattr(self, name) for name in names})
        return plain

    def __str__(self) -> str:
        """A short text for people."""
        if not self.estimate.num_measurements:
            return self.suggestion
        estimate = str(self.estimate)
        table = candidate_table(self.columns())
        return "\n".join([estimate[0].upper() + estimate[1:] + ".", *self.sentences(table)])

    def columns(self, *, intervals: bool = False) -> list[tuple[str, list[str]]]:
        """Return name and cells of each column of the table of candidates; steps and examples with their intervals."""
        return candidate_columns(
            self.candidates,
            self.more_ranks,
            present=self.estimate.batch_size,
            suggested=self.suggested_batch_size,
            unit=self.estimate.unit,
            intervals=intervals,
        )

    def sentences(self, table: Sequence[str] = ()) -> list[str]:
        """Return the advice in words alone, or around the lines of a table."""
        if math.isnan(self.suggested_batch_size):
            return [self.suggestion, *self.doubts]
        changes = self.suggested_batch_size != self.estimate.batch_size
        has_times = self.candidates[0].time is not None
        parts = [
            self.suggestion,
            smaller_micro_batch(self.estimate, self.configuration, self.target),
            costs(self.target, self.estimate.unit) if changes else "",
            *table,
            assumptions(self.run, on_more_ranks=bool(self.more_ranks)) if has_times else "",
            more_to_measure(self.estimate, self.run),
            *self.doubts,
            LEARNING_RATE_MATTERS if changes else "",
            MOMENTUM_MATTERS if changes and self.run.optimizer_family == "adam" else "",
        ]
        return [part for part in parts if part]

    @property
    def suggestion(self) -> str:
        """The batch size to try and what it would change, in a sentence or two."""
        if math.isnan(self.suggested_batch_size):
            return no_suggestion(self.estimate)
        present, unit = self.estimate.batch_size, self.estimate.unit
        size = f"{format_count(self.suggested_batch_size)} {unit}"
        if self.suggested_batch_size == present:
            return f"Keep the batch size: {size} is the reachable size nearest to {times_noise_scale(self.target)}."
        how = way_there(
            self.configuration,
            self.suggested_batch_size / present,
            self.suggested_accumulate_grad_batches,
            self.suggested_num_ranks,
        )
        sgd, adam = self.sgd_learning_rate_factor, self.adam_learning_rate_factor
        learning_rate = f"learning rate x{sgd:.2g} for SGD, x{adam:.2g} for Adam"
        if self.learning_rate is not None:
            learning_rate = f"{self.run.optimizer}'s learning rate {self.learning_rate}"
        return (
            f"{'Try' if self.estimate.is_resolved else 'A first guess, to be confirmed:'} a batch size of {size}: "
            f"{how}. To the same loss that is about "
            f"{change(self.steps.value, 'steps')} and {change(self.examples.value, unit)}; {learning_rate}."
        )


def advise_batch_size(
    estimate: NoiseScaleEstimate,
    configuration: RunConfiguration,
    run: ObservedRun | None = None,
    *,
    target: float = 1.0,
    price_per_device_hour: float | None = None,
) -> BatchSizeAdvice:
    """Suggest the reachable batch size nearest to the target times the noise scale.

    Reachable are whole multiples of one micro-batch on every rank.

    Args:
        estimate: The measured noise scale.
        configuration: Accumulation and ranks while it was measured.
        run: What else was seen of the run; the advice says less without.
        target: θ, the wished batch size over the noise scale. 1 is the balanced point of McCandlish et al. (arXiv
            1812.06162), which costs twice the fewest examples; 0.1 costs 10 % more than the fewest.
        price_per_device_hour: Of one rank's device, in any currency, for the cost of each candidate.

    Returns:
        The advice; without a suggestion where the noise scale is NaN or infinite.

    Raises:
        ValueError: If ``target`` or the price is not a positive number.

    Example:
        >>> estimate = NoiseScaleEstimate(
        ...     grad_sq_norm=0.05, cov_trace=6.4, noise_scale=128.0, lower=110.0, upper=150.0, batch_size=32.0,
        ...     num_measurements=400, coverage=1.0, unit="examples", probe="micro_batch", confidence=0.95)
        >>> advice = advise_batch_size(estimate, RunConfiguration(accumulate_grad_batches=2))
        >>> print(*str(advice).splitlines()[:10], sep=chr(10))
        Noise scale 128 examples (95 % interval 110 to 150; 400 measurements, batch size 32).
        Try a batch size of 128 examples: accumulate_grad_batches=8 instead of 2, or 4 ranks instead of 1. To the \
same loss that is about 2.5x fewer steps and 1.6x the examples; learning rate x2.5 for SGD, x1.6 for Adam.
        At the noise scale training costs twice the fewest possible examples (`target=0.1` costs 10 % more than the \
fewest) and twice the fewest possible steps.
          batch size  accumulate  steps  examples  efficiency
                  16           1   x1.8      x0.9         89%
                  32           2     x1        x1         80%  <- now
                  64           4   x0.6      x1.2         67%
                 128           8   x0.4      x1.6         50%  <- suggested
                 256          16   x0.3      x2.4         33%
                 512          32  x0.25        x4         20%
    """
    check_target(target)
    if price_per_device_hour is not None and not is_between(price_per_device_hour, 0.0):
        raise ValueError(
            f"`price_per_device_hour` must be a positive number or None, got {price_per_device_hour!r}; any currency "
            "will do."
        )
    run = run or ObservedRun()
    present = estimate.batch_size
    units_per_epoch = configuration.smallest_of(run.micro_batches_per_epoch * present)
    if not math.isfinite(estimate.noise_scale) or not present > 0 or estimate.impossible:
        doubts = doubts_about(estimate, run, suggested=math.nan, units_per_epoch=units_per_epoch)
        # that |G|² is not resolved is the advice itself here
        return BatchSizeAdvice(
            estimate=estimate, configuration=configuration, run=run, target=target, doubts=doubts[1:]
        )

    def candidate(size: float, num_ranks: int) -> Candidate:
        return make_candidate(
            estimate,
            configuration,
            run,
            batch_size=size,
            num_ranks=num_ranks,
            price_per_device_hour=price_per_device_hour,
        )

    wished, accumulate = target * estimate.noise_scale, configuration.accumulate_grad_batches
    # a whole multiple of the present size is so to the last digit
    micro_batches = max(1, round(wished if accumulate is None else wished / present * accumulate))
    size = float(micro_batches) if accumulate is None else micro_batches / accumulate * present
    sizes = reachable_sizes(present, accumulate, size)
    candidates = [candidate(each, configuration.num_ranks) for each in sizes]
    suggested = candidates[sizes.index(size)]
    ranks = [configuration.ranks_for(each.accumulate_grad_batches) for each in candidates]
    family, ends = run.optimizer_family, (estimate.noise_scale, estimate.lower, estimate.upper)
    return BatchSizeAdvice(
        estimate=estimate,
        configuration=configuration,
        run=run,
        target=target,
        suggested_batch_size=size,
        suggested_accumulate_grad_batches=suggested.accumulate_grad_batches or 0,
        suggested_num_ranks=ranks[sizes.index(size)],
        steps=suggested.steps,
        examples=suggested.examples,
        learning_rate=family
        and carry_interval(lambda noise: learning_rate_factor(family, present, size, noise), *ends),
        candidates=tuple(candidates),
        more_ranks=tuple(
            candidate(*pair) for pair in zip(sizes, ranks, strict=True) if pair[1] > configuration.num_ranks
        ),
        doubts=doubts_about(estimate, run, suggested=size, units_per_epoch=units_per_epoch),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
