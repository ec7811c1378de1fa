"""What training to the same loss takes at other batch sizes: steps, examples, hours, money."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_wn.batch_size.run import ObservedRun, RunConfiguration
from lightning_wn.batch_size.tradeoff import Factor, carry_interval, efficiency, examples_factor, steps_factor
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.text import format_count, text_table

_MULTIPLES = (0.25, 0.5, 1, 2, 4, 8, 16)


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
    num_ranks: int,
    price_per_device_hour: float | None = None,
) -> Candidate:
    """Work out what a batch size takes, with a finite noise scale.

    Times rest on two assumptions: a micro-batch takes as long as now, and so does what happens once in an optimizer
    step. On more ranks that is perfect data parallelism, with communication as cheap as now.
    """
    old, now = estimate.batch_size, present.accumulate_grad_batches
    ends = estimate.noise_scale, estimate.lower, estimate.upper
    steps = carry_interval(lambda critical: steps_factor(old, batch_size, critical), *ends)
    share = carry_interval(lambda critical: efficiency(batch_size, critical), *ends)
    accumulate = time = hours = device_hours = goodput = None
    if now is not None:
        accumulate = round(batch_size / old * now * present.num_ranks / num_ranks)
        if run.time is not None:
            seconds, present_seconds = run.time.seconds(accumulate), run.time.seconds(now)
            time = steps.scaled(seconds / present_seconds)
            goodput = share.value * batch_size / seconds
            if run.total_steps:
                hours = time.scaled(run.total_steps * present_seconds / 3600.0)
                device_hours = hours.scaled(num_ranks)
    return Candidate(
        batch_size=batch_size,
        accumulate_grad_batches=accumulate,
        num_ranks=num_ranks,
        steps=steps,
        examples=carry_interval(lambda critical: examples_factor(old, batch_size, critical), *ends),
        efficiency=share,
        goodput=goodput,
        time=time,
        hours=hours,
        device_hours=device_hours,
        cost=device_hours.scaled(price_per_device_hour) if device_hours and price_per_device_hour else None,
    )


def reachable_sizes(batch_size: float, accumulate_grad_batches: int | None, suggested: float) -> list[float]:
    """Return a quarter to 16 times a batch size as far as accumulation reaches, with the suggested one, in order."""
    accumulate = accumulate_grad_batches
    multiples = [m for m in _MULTIPLES if accumulate is None or float(m * accumulate).is_integer()]
    return sorted({m * batch_size for m in multiples} | {suggested})


def candidate_columns(
    candidates: Sequence[Candidate],
    more_ranks: Sequence[Candidate],
    *,
    present: float,
    suggested: float,
    unit: str,
    intervals: bool = False,
) -> list[tuple[str, list[str]]]:
    """Return name and cells of each column of a table with a batch size a row, for text and for HTML.

    Steps and examples are over those of now, with their intervals if asked for; times come where they are known. The
    last column, which has no name, remarks on the batch size of now and the suggested one.
    """
    on_ranks = {c.batch_size: f"{c.num_ranks}: {format_hours(c.hours.value)}" for c in more_ranks if c.hours}
    rows = [
        [
            ("batch size", format_count(c.batch_size)),
            ("accumulate", c.accumulate_grad_batches and str(c.accumulate_grad_batches)),
            ("steps", _times(c.steps, interval=intervals)),
            (unit, _times(c.examples, interval=intervals)),
            ("efficiency", f"{c.efficiency.value:.0%}"),
            ("time", format_hours(c.hours.value) if c.hours else c.time and _times(c.time)),
            ("device-hours", c.device_hours and f"{c.device_hours.value:.3g}"),
            ("cost", c.cost and f"{c.cost.value:,.2f}"),
            ("or on ranks", on_ranks.get(c.batch_size, "") if on_ranks else None),
            ("", " and ".join(n for n, s in (("now", present), ("suggested", suggested)) if s == c.batch_size)),
        ]
        for c in candidates
    ]
    columns = [(column[0][0], [cell for _, cell in column if cell is not None]) for column in zip(*rows, strict=True)]
    return [(name, cells) for name, cells in columns if cells]


def candidate_table(columns: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the lines of the table of :func:`candidate_columns`, with an arrow before each remark."""
    if not columns:
        return []
    remarks = ["", *(remark and f"  <- {remark}" for remark in columns[-1][1])]
    return [f"{line}{remark}".rstrip() for line, remark in zip(text_table(columns[:-1]), remarks, strict=True)]


def format_hours(hours: float) -> str:
    """Format a time for people."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.2g} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} d"


def _times(factor: Factor, *, interval: bool = False) -> str:
    """Write a factor, with its interval where it has one and that is wanted."""
    return str(factor) if interval and factor.lower < factor.upper else f"x{factor.value:.2g}"
