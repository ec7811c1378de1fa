"""Why a run ended without a measurement, and what to do about it: the true cause, not a guess."""

from __future__ import annotations

from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.callbacks.noise_scale.optimizer_measurement import OptimizerMeasurement
from lightning_wn.callbacks.noise_scale.summary import REASONS, WARNINGS
from lightning_wn.noise_scale.samples import Rejection
from lightning_wn.text import plural

_SINGLE = (
    "each of them had a single gradient sample; let an optimizer step have two examples or more, or two micro-batches "
    "by `Trainer(accumulate_grad_batches=2)`"
)


def why_nothing(measurements: Measurements) -> str:
    """Return one sentence for a run that measured nothing, with a fix that works.

    Args:
        measurements: Of the run, as of its end.
    """
    if measurements.why_off:
        return measurements.why_off
    return " ".join(dict.fromkeys(_why(measurement) for measurement in measurements))


def _why(measurement: OptimizerMeasurement) -> str:
    if not measurement.steps:
        return (
            "no optimizer step came by it; in manual optimization it hears of those that are made by "
            "`self.optimizers().step()`, and of none that is made by `optimizer.optimizer.step()`."
        )
    if measurement.num_late:
        return f"{measurement.probe.refusal}; `probe='auto'` goes over to another probe by itself."
    if not measurement.num_due:
        return (
            f"none of {plural(measurement.steps, 'optimizer step')} was its turn with one in "
            f"{measurement.every_n_steps}; train for more steps, or set `every_n_steps=1`."
        )
    looked_at = f"it looked at {plural(measurement.num_due, 'optimizer step')}, and "
    if measurement.probe.refusal:
        return f"{looked_at}could not read them: {measurement.probe.refusal}."
    reason, count = max(measurement.metric.rejected.items(), key=lambda item: item[1])
    if count:
        why = "; a warning names the likely causes" if reason in WARNINGS else ""
        single = reason is Rejection.SINGLE_SAMPLE
        return f"{looked_at}{_SINGLE}." if single else f"{looked_at}left them out: {count} {REASONS[reason]}{why}."
    return (
        f"{looked_at}found nothing to compare their gradients with; train for more steps, or lower `every_n_steps` "
        f"from {measurement.every_n_steps}."
    )
