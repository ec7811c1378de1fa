"""Whether the examples of a batch are independent: every so often, two batches are asked."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_wn.callbacks.noise_scale.optimizer_measurement import OptimizerMeasurement, ParameterChoice
from lightning_wn.noise_scale.batch_counting import BatchCount
from lightning_wn.noise_scale.metric import GradientNoiseScale
from lightning_wn.noise_scale.samples import ROW_SIZE, Rejection, measurement_from_row
from lightning_wn.noise_scale.statistics import student_t_quantile
from lightning_wn.probes.batch_pair import BatchPairProbe
from lightning_wn.probes.per_example import PerExampleProbe
from lightning_wn.probes.silent_copy import has_users_hooks

_FIRST, _EVERY = 40, 10
_LEAST = 8
# two-sided levels; only one side counts
_CONFIDENCE, _SUSPICION = 0.998, 0.8
_LEAST_SHARE = 0.2

SHARED_ROWS = (
    "gradients of whole batches vary more than those of independent examples would, so rows of a batch share data, as "
    "with mixup, CutMix, repeated augmentation, several crops of an image, or a loader that does not shuffle"
)
"""What an alarm says."""


class IndependenceCheck:
    """Compares tr(Σ) within a batch, by the probe ``per_example``, with tr(Σ) between two batches at the same weights.

    Where the examples of a batch are independent, both have the same mean, whatever the batch size. Where they share
    data, the batches differ more than the examples tell, and what the examples have in common is mistaken for |G|².
    No look at one batch can see that.

    For the first 40 measured steps, and then for one in ten (for each, while there is a suspicion at 10 %), the probe
    ``batch_pair`` takes the next batch's gradient, too, unless hooks of the user's would be called for it. Of each step
    the logarithm of the ratio of both traces is taken; under independence its mean is zero or less (Jensen's
    inequality: the trace between batches is the noisier of the two). There is an alarm once the mean of eight or more
    is above zero by Student's t, one-sided at 0.1 %, and at least a fifth of the |G|² within batches is what is too
    much.

    Args:
        choice: What is measured, as for the measurement that is checked.
    """

    def __init__(self, choice: ParameterChoice) -> None:
        self._checked: OptimizerMeasurement | None = None
        self._num_measured = 0
        self._within: Tensor | None = None
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._sum = self._sum_of_squares = 0.0
        self._excess = self._grad_sq_norm = 0.0
        self._suspects = False
        self.num_pairs = 0
        """Steps that were compared, as of the last :meth:`verdict`."""
        probe = self._told = _WhenTold()
        probe.strict = False
        self._pair = OptimizerMeasurement(ParameterChoice(layers=choice.layers), GradientNoiseScale(), probe)

    def attach(self, checked: OptimizerMeasurement, optimizer: Optimizer, model: LightningModule) -> None:
        """Check this measurement, which is the run's only one."""
        self._checked = checked
        self._pair.attach(optimizer, model, alone=True)

    @property
    def measuring(self) -> bool:
        """Whether the present step is checked."""
        return self._pair.measuring

    @property
    def waits_for_batch(self) -> bool:
        """Whether a step's second batch is still to come."""
        return self._pair.waits_for_batch

    def start_batch(self, trainer: Trainer, model: LightningModule, batch_idx: int) -> None:
        """Start a step, after the measurement that is checked has."""
        if self._checked is None:
            return
        checks = self._checked.measuring and isinstance(self._checked.probe, PerExampleProbe)
        always = self._suspects or self._num_measured < _FIRST
        self._told.due = checks and (always or self._num_measured % _EVERY == 0) and not self._pair.probe.refusal
        if self._told.due and has_users_hooks(model):
            self._told.due = False
        self._pair.start_batch(trainer, model, batch_idx)

    def see_batch(
        self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int, count: BatchCount
    ) -> None:
        """Complete a pair."""
        if self._checked is None:
            return
        metric = self._pair.metric
        self._pair.see_batch(trainer, model, batch, batch_idx, count)
        if len(metric.pending):
            within, self._within = self._within, None
            if within is not None:
                self._rows.append((within, metric.pending[-1]))
            metric.pending = metric.pending[:0]

    def before_forward(self, count: BatchCount) -> None:
        """Count the batch."""
        if self._checked is not None:
            if count.by_example is not None:
                # parts of an example are not independent, and the two traces have other means
                self.detach()
            self._pair.before_forward(count)

    def before_backward(self, loss: Tensor, model: LightningModule) -> None:
        """Watch a backward pass."""
        self._pair.before_backward(loss, model)

    def after_backward(self, trainer: Trainer, model: LightningModule) -> None:
        """Note the end of a backward pass."""
        self._pair.after_backward(trainer, model)

    def before_step(self, trainer: Trainer, model: LightningModule, num_rows: int) -> None:
        """Keep what the examples tell of this step, if it is checked.

        Args:
            trainer: The Trainer.
            model: The model.
            num_rows: Steps that waited in the checked metric before this one was added.
        """
        if self._checked is None:
            return
        rows = self._checked.metric.pending
        added = len(rows) > num_rows
        self._num_measured += added
        if added and self._pair.measuring and not self.waits_for_batch:
            self._within = rows[-1][:ROW_SIZE]
        self._pair.before_step(trainer, model)

    def detach(self) -> None:
        """Leave no hook behind, and check nothing more."""
        self._pair.detach()
        self._checked = self._within = None

    def verdict(self) -> bool:
        """Look at what came since the last time, and return whether examples share data."""
        tolerance = self._pair.metric.checksum_tolerance
        for rows in self._rows:
            within, between = (measurement_from_row(row.tolist(), tolerance) for row in rows)
            if not isinstance(within, Rejection) and not isinstance(between, Rejection):
                self._add(within.pairs[0], between.pairs[0], within.examples)
        self._rows = []
        count = self.num_pairs
        if count < _LEAST or self._checked is None:
            return False
        mean = self._sum / count
        variance = max(self._sum_of_squares / count - mean * mean, 0.0) / (count - 1)
        error, freedom = math.sqrt(variance), count - 1.0
        # soon to be decided
        self._suspects = mean > student_t_quantile(_SUSPICION, freedom) * error
        too_much = self._excess > _LEAST_SHARE * self._grad_sq_norm
        return too_much and mean > student_t_quantile(_CONFIDENCE, freedom) * error

    def _add(self, within: tuple[float, float] | None, between: tuple[float, float] | None, batch_size: float) -> None:
        if within is None or between is None or min(within[1], between[1]) <= 0.0:
            return
        ratio = math.log(between[1] / within[1])
        self._sum += ratio
        self._sum_of_squares += ratio * ratio
        # |G|² shrinks by orders of magnitude while a network learns: in units of the batch's noise
        noise = within[1] / batch_size
        self._excess += between[1] / within[1] - 1.0
        self._grad_sq_norm += within[0] / noise
        self.num_pairs += 1


class _WhenTold(BatchPairProbe):
    """The pair of batches, for the steps that are checked."""

    due = False
    """Whether the present step is checked."""

    def is_due(self, step: int, every_n_steps: int) -> bool:
        """Whether the present step is checked."""
        return self.due
