"""All estimates of a run, by optimizer and group; into checkpoints and out of them, and home from worker processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_wn.batch_size.advice_text import alarm
from lightning_wn.callbacks.noise_scale.curvature_measurement import CURVATURE, CurvatureMeasurement
from lightning_wn.callbacks.noise_scale.independence_check import IndependenceCheck
from lightning_wn.callbacks.noise_scale.optimizer_measurement import LossMeanOver, OptimizerMeasurement, ParameterChoice
from lightning_wn.callbacks.noise_scale.summary import BY_SIZES, WARNINGS
from lightning_wn.callbacks.worker_results import WorkerResults
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.metric import GradientNoiseScale, synchronize_together
from lightning_wn.noise_scale.samples import Rejection
from lightning_wn.probes.choice import PROBES
from lightning_wn.probes.micro_batch import MicroBatchProbe


class Measurements:
    """What is measured in one run: a sequence of :class:`OptimizerMeasurement`, and the curvature beside them.

    There is always one at least, so that an estimate can be asked for before there is an optimizer. All of them are
    read by the same probe at the same cadence. What users ask for (estimates, the size of a micro-batch) comes from
    the worker processes of a spawned or forked fit, too.

    Args:
        choice: What is measured of every optimizer.
        worker_results: Carries them home from worker processes; it outlives the run.
        probe: Name of the probe, as far as it is known; "auto" for one that a Trainer decides.
        every_n_steps: One in so many optimizer steps is measured; None takes the probe's own number.
        curvature_every_n_steps: The same for the curvature; None does not measure it.
        loss_mean_over: What the losses are divided by.
        metric_settings: Arguments of each :class:`~lightning_wn.GradientNoiseScale`.
    """

    def __init__(
        self,
        choice: ParameterChoice,
        worker_results: WorkerResults,
        *,
        probe: str = "auto",
        every_n_steps: int | None = None,
        curvature_every_n_steps: int | None = None,
        loss_mean_over: LossMeanOver = "auto",
        metric_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.choice = choice
        self.probe = MicroBatchProbe.name if probe == "auto" else probe
        self.every_n_steps = None if every_n_steps is None else int(every_n_steps)  # no numpy in checkpoints
        self._loss_mean_over = loss_mean_over
        self._metric_settings = dict(metric_settings or {})
        self._worker_results = worker_results
        worker_results.collect()  # of an earlier run
        self.curvature: CurvatureMeasurement | None = None
        if curvature_every_n_steps is not None:
            metric = GradientNoiseScale(**self._metric_settings)
            self.curvature = CurvatureMeasurement(curvature_every_n_steps, metric)
        self.check = IndependenceCheck(choice)
        self.why_off = ""
        """Why nothing can be measured in this run; empty where something can."""
        self._of_optimizers: list[OptimizerMeasurement] = []
        self._add_up_to(1)
        self._warned: set[Rejection] = set()
        self._said: set[str] = set()

    def __len__(self) -> int:
        """How many optimizers are measured."""
        return len(self._of_optimizers)

    def __getitem__(self, index: int) -> OptimizerMeasurement:
        """The measurement of the optimizer at a position."""
        return self._of_optimizers[index]

    def __iter__(self) -> Iterator[OptimizerMeasurement]:
        """Go through them in the optimizers' order."""
        return iter(self._of_optimizers)

    @property
    def followed(self) -> list[OptimizerMeasurement | IndependenceCheck]:
        """All that follows the run batch by batch."""
        return [*self._of_optimizers, self.check]

    @property
    def names(self) -> tuple[str, ...]:
        """What is measured beside each total."""
        return (*self.choice.names, *([CURVATURE] if self.curvature is not None else []))

    @property
    def metrics(self) -> list[GradientNoiseScale]:
        """All that samples go to."""
        return [measurement.metric for measurement in self] + ([self.curvature.metric] if self.curvature else [])

    def index_of(self, optimizer: int | None) -> int:
        """Return the position of the optimizer that a user names; None is the only one.

        Raises:
            ValueError: If there is no such optimizer, or several and none is named.
        """
        self.collect_results()
        count = len(self)
        if optimizer is None and count > 1:
            raise ValueError(
                f"`optimizer` must be named where there are several, each with a noise scale of its own; give one of "
                f"{list(range(count))}, or use `estimates()` for all."
            )
        index = optimizer or 0
        if not 0 <= index < count:
            raise ValueError(f"`optimizer` must be None or one of {list(range(count))}, got {optimizer!r}.")
        return index

    def start_of_key(self, index: int) -> str:
        """Return what names an optimizer in a key: nothing, where there is only one."""
        return f"optimizer_{index}/" if len(self) > 1 else ""

    def estimate(self, optimizer: int | None = None, group: str | None = None) -> NoiseScaleEstimate:
        """Return one estimate; see :meth:`~lightning_wn.GradientNoiseScaleCallback.estimate`."""
        measurement = self[self.index_of(optimizer)]
        if group == CURVATURE and self.curvature is not None:
            return self.curvature.estimate()
        if group is not None and group not in self.names:
            raise ValueError(f"`group` must be None or one of {list(self.names)}, got {group!r}; None is the total.")
        return measurement.estimate(group)

    def estimates(self) -> dict[str, NoiseScaleEstimate]:
        """Return all estimates; see :meth:`~lightning_wn.GradientNoiseScaleCallback.estimates`."""
        self.collect_results()
        return {
            self.start_of_key(index) + (group or "total"): self.estimate(index, group)
            for index in range(len(self))
            for group in (None, *self.names)
        }

    @property
    def micro_batch_size(self) -> float:
        """Size of one micro-batch of all ranks together; NaN before the first measurement."""
        metric = self[self.index_of(0)].metric
        micro_batches, ranks = metric.micro_batches_and_ranks
        return metric.last_estimate().batch_size * ranks / micro_batches if micro_batches else math.nan

    @property
    def has_measured(self) -> bool:
        """Whether any gradient noise scale has been measured."""
        self.collect_results()
        return any(measurement.metric.num_measurements for measurement in self)

    def attach(self, optimizers: Sequence[Optimizer], model: LightningModule) -> None:
        """Take the run's optimizers, one measurement each; a restored state may have brought some already."""
        self._add_up_to(len(optimizers))
        for measurement, optimizer in zip(self, optimizers, strict=False):
            measurement.attach(optimizer, model, alone=len(optimizers) == 1)
        if len(optimizers) == 1:
            self.check.attach(self[0], optimizers[0], model)

    def keep(self, count: int) -> None:
        """Drop those of a checkpoint that had more optimizers than the run."""
        del self._of_optimizers[max(count, 1) :]

    def before_step(self, trainer: Trainer, model: LightningModule, optimizer: Optimizer) -> None:
        """Read the gradient of an optimizer, before clipping."""
        for measurement, own in zip(self, trainer.optimizers, strict=False):
            if own is optimizer:
                num_rows = len(measurement.metric.pending)
                measurement.before_step(trainer, model)
                self.check.before_step(trainer, model, num_rows)

    def switch_off(self, why: str) -> None:
        """Measure no noise scale any more."""
        self.why_off = why
        for measurement in self:
            measurement.switch_off()

    def detach(self) -> None:
        """Leave no hook behind."""
        self.check.detach()
        for measurement in self:
            measurement.detach()
        if self.curvature is not None:
            self.curvature.forget_batches()

    def reset(self) -> None:
        """Forget all that was measured, here and in worker processes."""
        self._worker_results.collect()
        for metric in self.metrics:
            metric.reset()

    def synchronize(self, *, across_ranks: bool) -> None:
        """Fold what waits, of all metrics with a single all-reduce, and say once why steps are left out."""
        before = [metric.rejected for metric in self.metrics]
        synchronize_together(self.metrics, across_ranks=across_ranks)
        for metric, counts in zip(self.metrics, before, strict=True):
            for reason, count in metric.rejected.items():
                if count > counts[reason] and reason in WARNINGS and reason not in self._warned:
                    self._warned.add(reason)
                    rank_zero_warn(f"`GradientNoiseScaleCallback`: {WARNINGS[reason]}")
        for measurement in self:
            if measurement.metric.weights_follow_sizes:
                self._warn_once(BY_SIZES)
            if measurement.metric.num_measurements and (estimate := measurement.estimate()).impossible:
                self._warn_once(alarm(estimate))

    def _warn_once(self, sentence: str) -> None:
        # the start is the same where numbers differ
        if sentence[:40] not in self._said:
            self._said.add(sentence[:40])
            rank_zero_warn(f"`GradientNoiseScaleCallback`: {sentence}")

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives."""
        self.collect_results()
        covered = self.choice.covered
        return {
            "every_n_steps": self[0].every_n_steps,
            "probe": self.probe,
            "optimizers": [
                _metric_state(measurement.metric)
                | {"steps": measurement.steps, "coverage": dict(zip(covered, measurement.coverage, strict=True))}
                for measurement in self
            ],
            "curvature": None if self.curvature is None else _metric_state(self.curvature.metric, CURVATURE),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, fitting: bool) -> None:
        """Take over :meth:`state_dict`; a fit finds out for itself which probe reads it, how often and how much."""
        if not fitting:
            self.probe = state["probe"]
            self._of_optimizers = []
        self._add_up_to(len(state["optimizers"]))
        for measurement, own in zip(self, state["optimizers"], strict=False):
            _restore_metric(measurement.metric, own)
            measurement.steps = own["steps"]
            if not fitting:
                measurement.every_n_steps = state["every_n_steps"]
                measurement.coverage = tuple(own["coverage"].get(name, 1.0) for name in self.choice.covered)
        if self.curvature is not None and state["curvature"] is not None:
            _restore_metric(self.curvature.metric, state["curvature"], CURVATURE)

    def hand_over(self) -> None:
        """Leave the results for the parent process."""
        self._worker_results.hand_over(self.state_dict())

    def collect_results(self) -> None:
        """Take over what :meth:`hand_over` left in a worker process, if it did."""
        state = self._worker_results.collect()
        if state is not None:
            self.load_state_dict(state, fitting=False)

    def _add_up_to(self, count: int) -> None:
        while len(self) < count:
            metric = GradientNoiseScale(groups=self.choice.names, **self._metric_settings)
            measurement = OptimizerMeasurement(self.choice, metric, PROBES[self.probe](), self._loss_mean_over)
            measurement.every_n_steps = self.every_n_steps or measurement.every_n_steps
            if self.why_off:
                measurement.switch_off()
            self._of_optimizers.append(measurement)


def _metric_state(metric: GradientNoiseScale, total: str = "total") -> dict[str, Any]:
    """Return what a metric has folded, as tensors, by the names of its columns."""
    moments = {name: row.clone() for name, row in zip((total, *metric.groups), metric.moments, strict=True)}
    return {"moments": moments, "counts": metric.counts.clone()}


def _restore_metric(metric: GradientNoiseScale, state: Mapping[str, Any], total: str = "total") -> None:
    """Take over :func:`_metric_state`; a column that it lacks starts afresh, and all do where the unit was another."""
    metric.reset()
    empty = metric.moments[0]
    rows = [state["moments"].get(name, empty) for name in (total, *metric.groups)]
    if any(row.shape != empty.shape for row in rows) or state["counts"].shape != metric.counts.shape:
        return
    metric.moments = torch.stack([row.cpu().to(torch.float64) for row in rows])
    metric.counts = state["counts"].clone().cpu()
