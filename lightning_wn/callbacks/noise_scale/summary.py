"""The few lines at the end of a fit, and the sentences about steps that were left out."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_wn.batch_size.advice import BatchSizeAdvice
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.samples import Rejection
from lightning_wn.text import format_count

REASONS = {
    Rejection.SINGLE_SAMPLE: "had a single gradient sample",
    Rejection.NON_FINITE: "had NaN or infinite gradients",
    Rejection.MISMATCH: "had samples that do not add up to the optimizer's gradient",
    Rejection.IRREGULAR: "had gradients that came in several parts or were changed before the step",
    Rejection.EMPTY: "had a batch that counts no example",
}

WARNINGS = {
    Rejection.NON_FINITE: (
        "some gradients were NaN or infinite; those optimizer steps are left out on every rank (with a 16-bit "
        "loss scaler the first few are normal)."
    ),
    Rejection.EMPTY: (
        "a batch counts no example, and its optimizer step is left out on every rank; where that is not so, let "
        "`batch_size_fn` return what the loss is a mean over."
    ),
    Rejection.MISMATCH: (
        "the gradients of the samples (micro-batches or examples) do not add up to the gradient that the optimizer "
        "uses, and those steps are left out; likely causes are gradients that are edited before this callback reads "
        "them (clipped by value or layer by layer, rows set to zero, noise, hooks on tensors: edit them in a callback "
        "that stands after this one, or let Lightning clip), weights that the loss uses past their layer's forward "
        "(measure with another probe), a lossy DDP communication hook (PowerSGD), local SGD, parameters that were "
        "frozen when DDP wrapped the model (it never averages their gradients: leave them trainable until training "
        "starts), or a gradient left over from an accumulation factor that changed in mid-window."
    ),
    Rejection.IRREGULAR: (
        "a gradient came in several parts, or was changed before the optimizer's step, and those steps are left out; "
        "likely causes are reentrant activation checkpointing of a layer that is used twice (use "
        "`use_reentrant=False`), several backward calls for one optimizer in one training step (add the losses up "
        "and call it once), a closure that is run several times in a step (SAM, LBFGS: `measure_noise_scale` measures "
        "at fixed weights), gradients clipped after `manual_backward` (clip them in `on_before_optimizer_step`), or, "
        "under FSDP2, layers that only some micro-batches use."
    ),
}
"""What to say once, the first time that a step is left out for a reason that the user can act on."""

BY_SIZES = (
    "the gradients of micro-batches grow with what they count, as where a loss is a sum over the micro-batch, divided "
    "by the count of its whole accumulation window; samples are weighted so from here on, and measurements before are "
    "dropped. `loss_mean_over='window'` says so from the start, and 'micro_batch' that it is not so."
)
"""What to say where ``loss_mean_over="auto"`` finds other weights than it took."""


def fit_summary(
    advice: BatchSizeAdvice,
    rejected: Mapping[Rejection, int],
    every_n_steps: int,
    *,
    unread: int = 0,
    optimizer: int | None = None,
    others: Mapping[str, NoiseScaleEstimate] | None = None,
) -> str:
    """Return the result of a fit in a few lines: what was measured, what to try, and where the rest is.

    Args:
        advice: The advice on all measured parameters.
        rejected: Optimizer steps that were left out, by reason.
        every_n_steps: The cadence.
        unread: Optimizer steps that the probe could not read.
        optimizer: Its position, where there are several.
        others: Estimates of groups, by name.
    """
    estimate = advice.estimate
    of = "" if optimizer is None else f"Optimizer {optimizer}: "
    cadence = "every optimizer step" if every_n_steps == 1 else f"one optimizer step in {every_n_steps}"
    lines = [f"{of}gradient {estimate}, by the probe {estimate.probe!r} on {cadence}."]
    if others:
        found = (f"{name} {_short(other)}" for name, other in others.items())
        lines.append(f"Of its parts: {'; '.join(found)}.")
    left_out = [(count, REASONS[reason]) for reason, count in rejected.items()]
    left_out.append((unread, "could not be read by the probe"))
    if total := sum(count for count, _ in left_out):
        share = total / (total + estimate.num_measurements)
        reasons = ", ".join(f"{count} that {why}" for count, why in left_out if count)
        lines.append(f"Optimizer steps that were left out, {share:.0%} of those looked at: {reasons}.")
    if estimate.num_measurements:
        number = "" if optimizer is None else f"{optimizer}"
        count = len(advice.doubts)
        doubts = f" and {count} reason{'s' * (count > 1)} for doubt" if count else ""
        lines += [
            advice.suggestion,
            f"`print(callback.advise({number}))` says more: other batch sizes, in hours too, how sure it is{doubts}.",
        ]
    return "\n".join(line[0].upper() + line[1:] for line in lines)


def _short(estimate: NoiseScaleEstimate) -> str:
    span = f"{format_count(estimate.lower)} to {format_count(estimate.upper)}"
    return f"{format_count(estimate.noise_scale)} ({span})"
