"""From an estimate and the run's configuration to a suggestion in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_wn.batch_size.candidates import (
    Candidate,
    RunConfiguration,
    candidate_table,
    make_candidate,
    reachable_sizes,
)
from lightning_wn.batch_size.caveats import doubts_about, more_to_measure
from lightning_wn.batch_size.learning_rate import adam_learning_rate_factor, sgd_learning_rate_factor
from lightning_wn.batch_size.run import ObservedRun
from lightning_wn.batch_size.tradeoff import Factor, carry_interval, check_target, examples_factor, steps_factor
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.text import format_count

__all__ = ["BatchSizeAdvice", "RunConfiguration", "advise_batch_size"]

_UNKNOWN = Factor(math.nan, math.nan, math.nan)
_NOT_MEASURED = "No advice on the batch size: the noise scale was not measured yet."
_LEARNING_RATE_MATTERS = (
    "The noise scale depends on the learning rate: on handwritten digits it predicted 36 at the tuned rate of SGD, "
    "where 34 was measured, and 124 at a quarter of it. Tune the rate first, and measure again after a change."
)
_MOMENTUM_MATTERS = (
    "Momentum is not in it: on six small tasks with Adam the critical batch size was 1.3 to 3.4 times the noise scale; "
    "`measure_critical_batch_size` measures it."
)


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
        steps_factor: Optimizer steps to the same loss, suggested over present.
        examples_factor: Examples to the same loss, suggested over present.
        sgd_learning_rate_factor: Factor on the learning rate of SGD.
        adam_learning_rate_factor: Factor on the learning rate of Adam-like optimizers.
        steps: ``steps_factor`` with its interval.
        examples: ``examples_factor`` with its interval.
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
    suggested_batch_size: float
    suggested_accumulate_grad_batches: int
    suggested_num_ranks: int
    steps_factor: float
    examples_factor: float
    sgd_learning_rate_factor: float
    adam_learning_rate_factor: float
    steps: Factor
    examples: Factor
    learning_rate: Factor | None
    candidates: tuple[Candidate, ...]
    more_ranks: tuple[Candidate, ...]
    doubts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and None, nested as the attributes are; None is also not finite."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def __str__(self) -> str:
        """A short text for people."""
        estimate = self.estimate
        if not estimate.num_measurements:
            return _NOT_MEASURED
        return "\n".join([str(estimate)[0].upper() + str(estimate)[1:] + ".", *self.lines()])

    def lines(self) -> list[str]:
        """Return the advice without the estimate, line by line."""
        table = candidate_table(
            self.candidates,
            self.more_ranks,
            present=self.estimate.batch_size,
            suggested=self.suggested_batch_size,
            unit=self.estimate.unit,
        )
        return self.sentences(table)

    def sentences(self, table: Sequence[str] = ()) -> list[str]:
        """Return the advice in words alone, or around the lines of a table."""
        if math.isnan(self.suggested_batch_size):
            return [self.suggestion, *self.doubts]
        changes = self.suggested_batch_size != self.estimate.batch_size
        parts = [
            self.suggestion,
            self._smaller_micro_batch(),
            self._target() if changes else "",
            *table,
            self._assumptions(),
            more_to_measure(self.estimate, self.run),
            *self.doubts,
            _LEARNING_RATE_MATTERS if changes else "",
            _MOMENTUM_MATTERS if changes and self.run.optimizer_family == "adam" else "",
        ]
        return [part for part in parts if part]

    @property
    def suggestion(self) -> str:
        """The batch size to try and what it would change, in a sentence or two."""
        if not self.estimate.num_measurements:
            return _NOT_MEASURED
        if math.isnan(self.suggested_batch_size):
            lower, unit = self.estimate.lower, self.estimate.unit
            at_least = f" The noise scale is probably above {format_count(lower)} {unit}."
            return "No advice on the batch size: |G|² is not above zero yet; measure more steps." + (
                at_least if 0.0 < lower < math.inf else ""
            )
        old, new = self.configuration.accumulate_grad_batches, self.suggested_accumulate_grad_batches
        size, unit = format_count(self.suggested_batch_size), self.estimate.unit
        if self.suggested_batch_size == self.estimate.batch_size:
            of_it = "the noise scale" if self.target == 1 else f"{self.target:g} times the noise scale"
            return f"Keep the batch size: {size} {unit} is the reachable size nearest to {of_it}."
        how = f"{self.suggested_batch_size / self.estimate.batch_size:.2g} times the present one"
        if old is not None:
            how = f"accumulate_grad_batches={new} instead of {old}"
            if self.suggested_num_ranks > self.configuration.num_ranks:
                how += f", or {self.suggested_num_ranks} ranks instead of {self.configuration.num_ranks}"
        return (
            f"{'Try' if self.estimate.is_resolved else 'A first guess, to be confirmed:'} a batch size of {size} "
            f"{unit}: {how}. To the same "
            f"loss that is about {_change(self.steps_factor, 'steps')} and "
            f"{_change(self.examples_factor, unit)}; {self._learning_rate()}."
        )

    def _learning_rate(self) -> str:
        """Say the one factor that is meant, or both rules where the optimizer is not known."""
        factor = self.learning_rate
        if factor is None:
            sgd, adam = self.sgd_learning_rate_factor, self.adam_learning_rate_factor
            return f"learning rate x{sgd:.2g} for SGD, x{adam:.2g} for Adam"
        return f"{self.run.optimizer}'s learning rate x{factor.value:.2g} ({factor.lower:.2g} to {factor.upper:.2g})"

    def _target(self) -> str:
        size = "the noise scale" if self.target == 1 else f"{self.target:g} times the noise scale"
        examples = "twice" if self.target == 1 else f"{1 + self.target:.3g} times"
        steps = "twice" if self.target == 1 else f"{1 + 1 / self.target:.3g} times"
        fewer = " (`target=0.1` costs 10 % more than the fewest)" if self.target == 1 else ""
        return (
            f"At {size} training costs {examples} the fewest possible {self.estimate.unit}{fewer} and {steps} the "
            "fewest possible steps."
        )

    def _smaller_micro_batch(self) -> str:
        """Say how to get below one micro-batch on every rank, which accumulation cannot."""
        estimate, ranks, accumulate = self.estimate, self.configuration.num_ranks, 1
        if self.configuration.accumulate_grad_batches is None:
            return ""
        smallest = estimate.batch_size / self.configuration.accumulate_grad_batches
        wished = self.target * estimate.noise_scale
        if wished >= 0.7 * smallest:
            return ""
        # one device measures with two micro-batches or more
        accumulate = 2 if ranks == 1 else 1
        micro_batch = max(1, round(wished / (accumulate * ranks)))
        wish = "The noise scale" if self.target == 1 else f"{self.target:g} times the noise scale"
        return (
            f"{wish} is below one micro-batch per rank ({format_count(smallest)} {estimate.unit} in all): "
            f"micro-batches of about {format_count(micro_batch)} with accumulate_grad_batches={accumulate} would "
            "come closer."
        )

    def _assumptions(self) -> str:
        """Say what the times in the table rest on."""
        time = self.run.time
        if time is None or not self.candidates or self.candidates[0].time is None:
            return ""
        steps = self.run.total_steps
        text = f"Times to the loss that {steps:,} steps of now reach" if steps else "Times to the same loss"
        text += f", at {time.micro_batch_seconds:.3g} s a micro-batch and {time.step_seconds:.3g} s a step beside"
        if not time.is_split:
            text += " (not told apart)"
        if time.includes_measuring:
            text += ", measuring included"
        if self.more_ranks:
            text += "; on more ranks if these stay what they are, with communication as it is now"
        return text + "."


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
    if price_per_device_hour is not None and not 0 < price_per_device_hour < math.inf:
        raise ValueError(
            f"`price_per_device_hour` must be a positive number or None, got {price_per_device_hour!r}; any currency "
            "will do."
        )
    run = run or ObservedRun()
    present = estimate.batch_size
    if not math.isfinite(estimate.noise_scale) or not present > 0:
        return _without_suggestion(estimate, configuration, run, target)
    suggested, accumulate = _nearest_reachable(target * estimate.noise_scale, present, configuration)
    ends = estimate.noise_scale, estimate.lower, estimate.upper

    def factor(rule: Callable[[float, float, float], float]) -> Factor:
        return carry_interval(lambda critical: rule(present, suggested, critical), *ends)

    sgd, adam = factor(sgd_learning_rate_factor), factor(adam_learning_rate_factor)
    steps, examples = factor(steps_factor), factor(examples_factor)
    ranks = suggested / present * configuration.num_ranks
    candidates = tuple(
        make_candidate(estimate, configuration, run, batch_size=size, price_per_device_hour=price_per_device_hour)
        for size in reachable_sizes(estimate, configuration, [suggested])
    )
    return BatchSizeAdvice(
        estimate=estimate,
        configuration=configuration,
        run=run,
        target=target,
        suggested_batch_size=suggested,
        suggested_accumulate_grad_batches=accumulate,
        suggested_num_ranks=int(ranks) if ranks.is_integer() and accumulate else 0,
        steps_factor=steps.value,
        examples_factor=examples.value,
        sgd_learning_rate_factor=sgd.value,
        adam_learning_rate_factor=adam.value,
        steps=steps,
        examples=examples,
        learning_rate={"sgd": sgd, "adam": adam, None: None}[run.optimizer_family],
        candidates=candidates,
        more_ranks=_on_more_ranks(estimate, configuration, run, candidates, price_per_device_hour),
        doubts=doubts_about(
            estimate, run, suggested=suggested, units_per_epoch=_units_per_epoch(estimate, configuration, run)
        ),
    )


def _without_suggestion(
    estimate: NoiseScaleEstimate, configuration: RunConfiguration, run: ObservedRun, target: float
) -> BatchSizeAdvice:
    doubts = doubts_about(estimate, run, suggested=math.nan, units_per_epoch=math.inf)
    return BatchSizeAdvice(
        estimate=estimate,
        configuration=configuration,
        run=run,
        target=target,
        suggested_batch_size=math.nan,
        suggested_accumulate_grad_batches=0,
        suggested_num_ranks=0,
        steps_factor=math.nan,
        examples_factor=math.nan,
        sgd_learning_rate_factor=math.nan,
        adam_learning_rate_factor=math.nan,
        steps=_UNKNOWN,
        examples=_UNKNOWN,
        learning_rate=None,
        candidates=(),
        more_ranks=(),
        # that |G|² is not resolved is the advice itself here
        doubts=doubts[1:],
    )


def _nearest_reachable(wished: float, present: float, configuration: RunConfiguration) -> tuple[float, int]:
    """Return the batch size and its ``accumulate_grad_batches``, 0 where that is not known."""
    if configuration.accumulate_grad_batches is None:
        return float(max(1, round(wished))), 0
    smallest = present / configuration.accumulate_grad_batches
    accumulate = max(1, round(wished / smallest))
    return accumulate * smallest, accumulate


def _on_more_ranks(
    estimate: NoiseScaleEstimate,
    configuration: RunConfiguration,
    run: ObservedRun,
    candidates: tuple[Candidate, ...],
    price_per_device_hour: float | None,
) -> tuple[Candidate, ...]:
    """Return the larger candidates that whole ranks give with the present accumulation."""
    found = []
    for candidate in candidates:
        ranks = candidate.batch_size / estimate.batch_size * configuration.num_ranks
        if ranks > configuration.num_ranks and float(ranks).is_integer() and candidate.accumulate_grad_batches:
            found.append(
                make_candidate(
                    estimate,
                    configuration,
                    run,
                    batch_size=candidate.batch_size,
                    num_ranks=int(ranks),
                    price_per_device_hour=price_per_device_hour,
                )
            )
    return tuple(found)


def _units_per_epoch(estimate: NoiseScaleEstimate, configuration: RunConfiguration, run: ObservedRun) -> float:
    if configuration.accumulate_grad_batches is None:
        return math.inf
    return run.micro_batches_per_epoch * estimate.batch_size / configuration.accumulate_grad_batches


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
