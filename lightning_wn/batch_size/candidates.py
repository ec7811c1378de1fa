"""What training to the same loss takes at other batch sizes: steps, examples, hours, money."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_wn.batch_size.run import ObservedRun
from lightning_wn.batch_size.tradeoff import Factor, carry_interval, efficiency, examples_factor, steps_factor
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.text import format_count, text_table

_MULTIPLES = (0.25, 0.5, 1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class RunConfiguration:
    """What makes up the batch size of a run.

    Attributes:
        accumulate_grad_batches: Micro-batches per optimizer step on each rank; None where it is not known, as in
            logs, so that only whole batch sizes can be spoken of.
        num_ranks: Data-parallel ranks.
    """

    accumulate_grad_batches: int | None = 1
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A batch size and what training to the same loss takes there.

    Attributes:
        batch_size: In the estimate's unit.
        accumulate_grad_batches: Micro-batches per optimizer step on each rank; None where not known.
        num_ranks: Data-parallel ranks.
        steps: Optimizer steps, over those at the present batch size.
        examples: Examples, over those at the present batch size.
        efficiency: E_min/E, the share of the examples that are really needed, 0 to 1.
        goodput: Needed examples per second, throughput times efficiency (Qiao et al., Pollux, OSDI 2021);
            None while the run's times are not known.
        time: Wall-clock time, over that at the present batch size; None like ``goodput``.
        hours: Wall-clock hours to the loss that the run reaches; None, too, where its length is not known.
        device_hours: The same times the number of devices, one a rank.
        cost: Device-hours times their price; None where no price was given.
    """

    batch_size: float
    accumulate_grad_batches: int | None
    num_ranks: int
    steps: Factor
    examples: Factor
    efficiency: Factor
    goodput: float | None = None
    time: Factor | None = None
    hours: Factor | None = None
    device_hours: Factor | None = None
    cost: Factor | None = None


def make_candidate(
    estimate: NoiseScaleEstimate,
    present: RunConfiguration,
    run: ObservedRun,
    *,
    batch_size: float,
    num_ranks: int | None = None,
    price_per_device_hour: float | None = None,
) -> Candidate:
    """Work out what a batch size takes.

    Times rest on two assumptions: a micro-batch takes as long as now, and so does what happens once in an optimizer
    step. On more ranks that is perfect data parallelism, with communication as cheap as now.

    Args:
        estimate: A finite noise scale with its interval, and the present batch size.
        present: The run that was measured.
        run: What was seen of it.
        batch_size: The batch size, in the estimate's unit.
        num_ranks: Ranks that share it; those of now by default.
        price_per_device_hour: In any currency.

    Example:
        >>> from lightning_wn.callbacks.noise_scale.run_timer import RunTime
        >>> estimate = NoiseScaleEstimate(
        ...     grad_sq_norm=0.05, cov_trace=6.4, noise_scale=128.0, lower=110.0, upper=150.0, batch_size=32.0,
        ...     num_measurements=400, coverage=1.0, unit="examples", probe="micro_batch", confidence=0.95)
        >>> time = RunTime(micro_batch_seconds=0.9, step_seconds=1.8, num_steps=100)
        >>> run = ObservedRun(num_steps=1000, time=time)  # 3.6 seconds a step, one hour in all
        >>> candidate = make_candidate(estimate, RunConfiguration(accumulate_grad_batches=2), run, batch_size=128)
        >>> candidate.accumulate_grad_batches, candidate.steps.value, candidate.hours.value
        (8, 0.4, 1.0)
    """
    old = estimate.batch_size
    ranks = num_ranks or present.num_ranks
    accumulate = None
    if present.accumulate_grad_batches is not None:
        accumulate = round(batch_size / old * present.accumulate_grad_batches * present.num_ranks / ranks)
    ends = estimate.noise_scale, estimate.lower, estimate.upper
    steps = carry_interval(lambda critical: steps_factor(old, batch_size, critical), *ends)
    share = carry_interval(lambda critical: efficiency(batch_size, critical), *ends)
    time = hours = device_hours = goodput = None
    if run.time is not None and accumulate is not None and present.accumulate_grad_batches is not None:
        seconds, now = run.time.seconds(accumulate), run.time.seconds(present.accumulate_grad_batches)
        time = steps.scaled(seconds / now)
        goodput = share.value * batch_size / seconds
        if run.total_steps:
            hours = time.scaled(run.total_steps * now / 3600.0)
            device_hours = hours.scaled(ranks)
    cost = None
    if device_hours is not None and price_per_device_hour is not None:
        cost = device_hours.scaled(price_per_device_hour)
    return Candidate(
        batch_size=batch_size,
        accumulate_grad_batches=accumulate,
        num_ranks=ranks,
        steps=steps,
        examples=carry_interval(lambda critical: examples_factor(old, batch_size, critical), *ends),
        efficiency=share,
        goodput=goodput,
        time=time,
        hours=hours,
        device_hours=device_hours,
        cost=cost,
    )


def reachable_sizes(estimate: NoiseScaleEstimate, present: RunConfiguration, others: Iterable[float]) -> list[float]:
    """Return a quarter to 16 times the present batch size as far as accumulation reaches, with others, in order.

    Example:
        >>> estimate = NoiseScaleEstimate(
        ...     grad_sq_norm=0.05, cov_trace=6.4, noise_scale=128.0, lower=110.0, upper=150.0, batch_size=32.0,
        ...     num_measurements=400, coverage=1.0, unit="examples", probe="micro_batch", confidence=0.95)
        >>> reachable_sizes(estimate, RunConfiguration(accumulate_grad_batches=2), [128, 96])
        [16.0, 32.0, 64.0, 96, 128.0, 256.0, 512.0]
    """
    accumulate = present.accumulate_grad_batches
    multiples = [m for m in _MULTIPLES if accumulate is None or float(m * accumulate).is_integer()]
    sizes = {m * estimate.batch_size for m in multiples} | {size for size in others if math.isfinite(size)}
    return sorted(sizes)


def candidate_table(
    candidates: Sequence[Candidate], more_ranks: Sequence[Candidate], *, present: float, suggested: float, unit: str
) -> list[str]:
    """Return the lines of a table: a batch size a row, steps and examples over those of now, and times where known.

    Args:
        candidates: By accumulation.
        more_ranks: The same batch sizes on more ranks, as far as there are any.
        present: The batch size of now.
        suggested: The batch size that is suggested.
        unit: What is counted.
    """
    if not candidates:
        return []
    by_ranks = {candidate.batch_size: candidate for candidate in more_ranks if candidate.hours is not None}
    columns = [("batch size", [format_count(c.batch_size) for c in candidates])]
    if any(c.accumulate_grad_batches is not None for c in candidates):
        columns.append(("accumulate", [str(c.accumulate_grad_batches) for c in candidates]))
    columns += [
        ("steps", [f"x{c.steps.value:.2g}" for c in candidates]),
        (unit, [f"x{c.examples.value:.2g}" for c in candidates]),
        ("efficiency", [f"{c.efficiency.value:.0%}" for c in candidates]),
    ]
    if all(c.hours is not None for c in candidates):
        columns.append(("time", [format_hours(c.hours.value) for c in candidates if c.hours is not None]))
    elif all(c.time is not None for c in candidates):
        columns.append(("time", [f"x{c.time.value:.2g}" for c in candidates if c.time is not None]))
    if all(c.device_hours is not None for c in candidates):
        columns.append(("device-hours", [f"{c.device_hours.value:.3g}" for c in candidates if c.device_hours]))
    if all(c.cost is not None for c in candidates):
        columns.append(("cost", [f"{c.cost.value:,.2f}" for c in candidates if c.cost is not None]))
    if by_ranks:
        columns.append(("or on ranks", [_on_ranks(by_ranks.get(c.batch_size)) for c in candidates]))
    remarks = ["", *(_remark(c.batch_size, present, suggested) for c in candidates)]
    return [f"{line}  {remark}".rstrip() for line, remark in zip(text_table(columns), remarks, strict=True)]


def format_hours(hours: float) -> str:
    """Format a time for people.

    Example:
        >>> [format_hours(x) for x in (0.0002, 0.05, 1.234, 400.0)]
        ['0.72 s', '3 min', '1.2 h', '16.7 d']
    """
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.2g} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} d"


def _on_ranks(candidate: Candidate | None) -> str:
    if candidate is None or candidate.hours is None:
        return ""
    return f"{candidate.num_ranks}: {format_hours(candidate.hours.value)}"


def _remark(size: float, present: float, suggested: float) -> str:
    names = [name for name, other in (("now", present), ("suggested", suggested)) if size == other]
    return f"<- {' and '.join(names)}" if names else ""
