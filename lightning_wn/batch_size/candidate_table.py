"""Candidates for the batch size as a small text table."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_wn.batch_size.candidates import Candidate
from lightning_wn.batch_size.text_table import text_table
from lightning_wn.noise_scale.estimate import format_count


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
