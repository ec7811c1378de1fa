"""Watches a run for what advice on its batch size needs: its optimizers, its length, its times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_wn.batch_size.advice import BatchSizeAdvice, RunConfiguration, advise_batch_size
from lightning_wn.batch_size.learning_rate import OptimizerFamily, optimizer_family
from lightning_wn.batch_size.run import ObservedRun
from lightning_wn.callbacks.noise_scale.optimizer_measurement import OptimizerMeasurement
from lightning_wn.callbacks.noise_scale.run_timer import RunTimer


class RunWatch:
    """Follows a run from hook to hook; it reads the host's clock and what the Trainer knows, and nothing else.

    Of a run in other processes (``ddp_spawn``) and of one that was only loaded from a checkpoint it knows nothing.
    """

    def __init__(self) -> None:
        self._timer = RunTimer()
        self._optimizers: list[tuple[str, OptimizerFamily | None]] = []
        self._run = ObservedRun()
        self._learning_rate = math.nan
        self._watches = False
        self._micro_batches = 0
        self._measured = False

    def start(self, trainer: Trainer, model: LightningModule) -> None:
        """Take what is known when training starts."""
        self._watches = model.automatic_optimization
        # elsewhere the host hands kernels to the device and goes on
        self._timer = RunTimer(runs_ahead=trainer.strategy.root_device.type != "cpu")
        self._name_optimizers(trainer.optimizers)
        self._run = replace(self._run, micro_batches_per_epoch=float(trainer.num_training_batches))
        if self._watches:
            planned = float(trainer.estimated_stepping_batches)
            # -1 is how the Trainer says that neither steps nor batches are counted
            self._run = replace(self._run, planned_steps=planned if planned > 0 else math.inf)

    def start_batch(self, trainer: Trainer, batch_idx: int) -> None:
        """Note the beginning of a micro-batch."""
        if not self._watches:
            return
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first:
            self._micro_batches, self._measured = 0, False
        self._micro_batches += 1
        self._timer.start_batch(first=first)

    def note_measuring(self, measuring: bool) -> None:
        """Note whether the noise scale is measured in this optimizer step."""
        self._measured |= measuring

    def before_step(self) -> None:
        """Note that the gradients are complete."""
        if self._watches:
            self._timer.before_step()

    def after_step(self, trainer: Trainer) -> None:
        """Note the end of an optimizer step; in manual optimization only that there was one."""
        self._run = replace(self._run, num_steps=trainer.global_step)
        if not self._watches:
            return
        full = self._micro_batches == trainer.accumulate_grad_batches
        self._timer.end_window(full=full, measured=self._measured)
        learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        # a tensor may lie on the device, which is not to be waited for
        if not isinstance(learning_rate, Tensor):
            self._run = replace(self._run, learning_rate_rises=learning_rate > self._learning_rate)
            self._learning_rate = learning_rate

    def interrupt(self) -> None:
        """Note that something else than training begins."""
        self._timer.interrupt()

    def end(self, trainer: Trainer) -> None:
        """Note that the run has ended, maybe before its time."""
        self._timer.interrupt()
        self._name_optimizers(trainer.optimizers)
        if self._watches:
            self._run = replace(self._run, planned_steps=float(trainer.global_step))

    def advise(
        self,
        measurement: OptimizerMeasurement,
        index: int,
        *,
        target: float = 1.0,
        price_per_device_hour: float | None = None,
    ) -> BatchSizeAdvice:
        """Return the advice on what was measured of the optimizer at this position, and on what was seen."""
        name, family = self._optimizers[index] if index < len(self._optimizers) else ("", None)
        run = replace(
            self._run,
            optimizer=name,
            optimizer_family=family,
            every_n_steps=measurement.every_n_steps,
            ema_decay=measurement.metric.ema_decay,
            time=self._timer.run_time(),
        )
        # of the step that the batch size is of, whatever the Trainer's factor has become since
        micro_batches, ranks = measurement.metric.micro_batches_and_ranks
        accumulation = {"accumulate_grad_batches": micro_batches // ranks, "num_ranks": ranks} if ranks else {}
        return advise_batch_size(
            measurement.estimate(),
            RunConfiguration(**accumulation),
            run,
            target=target,
            price_per_device_hour=price_per_device_hour,
        )

    def _name_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = [(type(optimizer).__name__, optimizer_family(optimizer)) for optimizer in optimizers]
