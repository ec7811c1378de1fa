"""The table at the end of a fit, and the sentences about steps that were left out."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_wn.batch_size.advice import BatchSizeAdvice
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate, format_count
from lightning_wn.noise_scale.samples import Rejection

_REASONS = {
    Rejection.SINGLE_SAMPLE: "had a single gradient sample",
    Rejection.NON_FINITE: "had NaN or infinite gradients",
    Rejection.MISMATCH: "had samples that do not add up to the optimizer's gradient",
    Rejection.IRREGULAR: "had gradients that came in several parts or were changed before the step",
}

WARNINGS = {
    Rejection.NON_FINITE: (
        "some gradients were NaN or infinite; those optimizer steps are left out on every rank (with a 16-bit "
        "loss scaler the first few are normal; a `batch_size_fn` that returns a tensor must not return zero)."
    ),
    Rejection.MISMATCH: (
        "the micro-batch gradients do not add up to the gradient that the optimizer uses, and those steps are left "
        "out; likely causes are a lossy DDP communication hook (PowerSGD), local SGD, parameters that were frozen when "
        "DDP wrapped the model (it never averages their gradients: leave them trainable until training starts), a "
        "gradient left over from an accumulation factor that changed in mid-window, or a hook or callback that edits "
        "gradients before this one: remove it, or list this callback before it."
    ),
    Rejection.IRREGULAR: (
        "a gradient came in several parts, or was changed before the optimizer's step, and those steps are left out; "
        "likely causes are reentrant activation checkpointing of a layer that is used twice (use "
        "`use_reentrant=False`), several backward calls for one optimizer in one training step (add the losses up "
        "and call it once), gradients clipped after `manual_backward` (clip them in `on_before_optimizer_step`), or, "
        "under FSDP2, layers that only some micro-batches use."
    ),
}
"""What to say once, the first time that a step is left out for a reason that the user can act on."""


def summary_table(
    estimate: NoiseScaleEstimate,
    advice: BatchSizeAdvice,
    rejected: dict[Rejection, int],
    every_n_steps: int,
    *,
    optimizer: str = "",
    others: Mapping[str, NoiseScaleEstimate] | None = None,
) -> str:
    """Return the result of a fit as a small table, followed by the advice in words.

    Args:
        estimate: That of all measured parameters.
        advice: The advice on it.
        rejected: Optimizer steps that were left out, by reason.
        every_n_steps: The cadence.
        optimizer: Its name, where there are several.
        others: Estimates of groups, by name.
    """
    of = f" of {optimizer}" if optimizer else ""
    title = f"Gradient noise scale{of} (probe {estimate.probe}, every {every_n_steps} optimizer steps)"
    left_out = [f"{count} that {_REASONS[reason]}" for reason, count in rejected.items() if count]
    unit = estimate.unit
    rows = [("measured optimizer steps", f"{estimate.num_measurements}")]
    if left_out:
        rows.append(("left out", ", ".join(left_out)))
    if estimate.num_measurements:
        level = f"{estimate.confidence * 100:g} % interval"
        rows += [
            ("noise scale", f"{format_count(estimate.noise_scale)} {unit}{' (approximate)' * estimate.approximate}"),
            (level, f"{format_count(estimate.lower)} to {format_count(estimate.upper)} {unit}"),
            ("|G|²", f"{estimate.grad_sq_norm:.4g}"),
            ("tr(Σ)", f"{estimate.cov_trace:.4g}"),
            ("batch size", f"{format_count(estimate.batch_size)} {unit}"),
            ("suggested batch size", f"{format_count(advice.suggested_batch_size)} {unit}"),
        ]
        if estimate.coverage < 1.0:
            rows.append(("measured parameters", f"{estimate.coverage:.1%}"))
        for name, other in (others or {}).items():
            span = f"{format_count(other.lower)} to {format_count(other.upper)}"
            rows.append((name, f"{format_count(other.noise_scale)} {unit} ({span})"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}} | {value}" for name, value in rows]
    rule = "-" * max(map(len, [title, *lines]))
    words = str(advice).split("\n", 1)[1:]
    return "\n".join([title, rule, *lines, rule, *words])
