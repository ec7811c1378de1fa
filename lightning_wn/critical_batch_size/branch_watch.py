"""One branch: a short training at one batch size and learning rate, watched by a callback."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_wn.callbacks.noise_scale.callback import GradientNoiseScaleCallback
from lightning_wn.callbacks.whole_windows import WholeWindows
from lightning_wn.critical_batch_size.branch_schedule import BranchSchedule, PlannedTrainer
from lightning_wn.critical_batch_size.isolation import require_callbacks_in_place
from lightning_wn.critical_batch_size.loss_curve import SMOOTHING, CurveRecorder, LossCurve
from lightning_wn.noise_scale.batch_counting import BatchSizeFn, count_examples
from lightning_wn.trainer import callbacks_of, is_log_step

_LOOK_AGAIN = 0.03
"""Losses are read from the device, and looked at, whenever there are 3 % more steps."""


class BranchWatch(WholeWindows):
    """Trains a branch at its learning rate, records its losses, and ends it.

    Args:
        schedule: Keeps schedulers in step with the data, and knows the branch's length and batch size.
        rate_factor: What the learning rate is multiplied with, within the optimizer's step alone.
        first_batch: Examples that the first batch must hold, or fewer if it is alone; None to take what comes.
        target_loss: End soon after the smoothed loss got there.
        most_steps: End after so many optimizer steps.
        monitor: Record this metric at the end of each validation in place of the loss.
        batch_size_fn: From a batch to its number of examples.
        on_progress: Told the examples so far and the last loss.
    """

    def __init__(
        self,
        schedule: BranchSchedule,
        *,
        rate_factor: float = 1.0,
        first_batch: int | None = None,
        target_loss: float | None = None,
        most_steps: float = math.inf,
        monitor: str | None = None,
        batch_size_fn: BatchSizeFn | None = None,
        on_progress: Callable[[float, float], None] = lambda examples, loss: None,
    ) -> None:
        super().__init__()
        self.diverged = False
        self.noise_scales: list[tuple[int, float]] = []
        self._rate_factor = rate_factor
        self.schedule = schedule
        self._first_batch = first_batch
        self._examples = 0.0
        self._target_loss = target_loss
        self._most_steps = most_steps
        self._monitor = monitor
        self._batch_size_fn = batch_size_fn
        self._on_progress = on_progress
        self._losses = CurveRecorder()
        self._monitored: list[tuple[int, float, float]] = []
        self._steps = 0
        self._batches = 0
        self._batches_before = 0
        self._batches_without_loss = 0
        self._look_at = 1
        # of the window under way, and of windows whose losses are still on the device
        self._here: list[tuple[Tensor, float | Tensor]] = []
        self._waiting: list[tuple[Tensor, float | Tensor]] = []

    @property
    def curve(self) -> LossCurve:
        """Losses, or monitored values, so far."""
        return LossCurve(*map(tuple, zip(*self._monitored, strict=True))) if self._monitor else self._losses.curve()

    @property
    def smoothing(self) -> float:
        """How the curve is to be smoothed."""
        return 0.0 if self._monitor else SMOOTHING

    @property
    def is_over(self) -> bool:
        """Whether the branch came to an end of its own, and not to one of the Trainer's."""
        return self._is_whole or self._steps >= self._most_steps

    @property
    def given_up(self) -> int | None:
        """The optimizer steps after which it was given up for being too slow, if it was."""
        return None if self._is_whole or self._steps < self._most_steps else self._steps

    @property
    def _is_whole(self) -> bool:
        return self.diverged or self._examples >= self.schedule.num_examples or self._is_there()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse callbacks out of place, the model's own among them, and say how long training is when it is asked."""
        require_callbacks_in_place(callbacks_of(trainer), f"`configure_callbacks` of {type(pl_module).__name__}")
        # not before, as data modules are set up by now
        if isinstance(trainer, PlannedTrainer) and stage == "fit" and not self.schedule.resumes:
            trainer.plan = self.schedule.planned_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take hold of the optimizer's step."""
        self.schedule.require_steps_in_time(trainer)
        self._take_hold_of_optimizer(trainer.optimizers[0], self._rate_factor)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the data of an epoch anew."""
        self.schedule.start_epoch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss, and at the end of a window step schedulers and see whether the branch is over."""
        if not self._batches:
            self._check_first_batch(trainer, batch, batch_idx)
        self._batches += 1
        self.schedule.count(trainer, batch)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided it
            loss = loss.detach() * trainer.accumulate_grad_batches
            self._here.append((loss, count_examples(batch, self._batch_size_fn).total))
            self._batches_without_loss = 0
        else:
            self._batches_without_loss += 1
            without_loss = self._batches_without_loss / trainer.accumulate_grad_batches * self.schedule.batch_size
            if without_loss >= self.schedule.num_examples:  # no example counts, and there would be no end
                trainer.should_stop = True
        if not self._stepped:
            return
        self._stepped = False
        self._steps += 1
        if self._here:
            losses, sizes = zip(*self._here, strict=True)
            self._waiting.append((torch.stack(losses).mean(), sum(sizes)))
            self._here = []
        if is_log_step(trainer):
            self._read_noise_scale(trainer)
        if self._steps >= self._look_at or self._steps >= self._most_steps:
            self._look(trainer)
            # the end is met exactly, though a short window has fewer examples
            left = math.ceil(min(self.schedule.num_examples - self._examples, 2.0**53) / self.schedule.batch_size)
            self._look_at = self._steps + max(1, min(left, math.ceil(self._steps * _LOOK_AGAIN)))
            if self.is_over:
                trainer.should_stop = True
        self.schedule.make_up(trainer, pl_module, self._examples)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where data has come to an end for good, which would be waited for for ever."""
        if self._batches == self._batches_before:
            trainer.should_stop = True
        self._batches_before = self._batches

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the monitored value."""
        if self._monitor is None or not self._steps:
            return
        value = monitored_value(trainer.callback_metrics, self._monitor)
        self._look(trainer)
        if not math.isfinite(value):
            self.diverged = True
        elif not self._monitored or self._monitored[-1][0] < self._steps:
            self._monitored.append((self._steps, self._examples, value))
        if self.is_over:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last losses and leave the optimizer."""
        self._look(trainer)
        if not self.noise_scales:  # a branch may be shorter than the interval of logging
            self._read_noise_scale(trainer)
        self._let_go_of_optimizer()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizer as it was."""
        self._let_go_of_optimizer()

    def add_monitored(self, value: float) -> None:
        """Add a value of the end of the branch."""
        if math.isfinite(value):
            self._monitored.append((self._steps, self._examples, value))
        else:
            self.diverged = True

    def require_end(self, name: str) -> None:
        """Raise ValueError if the Trainer ended the branch before its time.

        Args:
            name: The branch's.
        """
        if self.is_over:
            return
        if not self._batches:
            raise ValueError(
                f"`data` gave no batch for the branch {name}; a batch may be larger than the data set, and "
                "`drop_last=True` then leaves none."
            )
        if not self._examples:
            raise ValueError(f"The branch {name} has no loss; let `training_step` return it.")
        raise ValueError(
            f"The branch {name} ended after {self._examples:g} of {self.schedule.num_examples:g} examples; "
            "neither `trainer_kwargs` (a small `max_steps`, an EarlyStopping) nor data that is used up for good may "
            "end it before."
        )

    def _is_there(self) -> bool:
        return self._target_loss is not None and math.isfinite(self.curve.steps_to(self._target_loss, self.smoothing))

    def _read_noise_scale(self, trainer: Trainer) -> None:
        found = [callback for callback in callbacks_of(trainer) if isinstance(callback, GradientNoiseScaleCallback)]
        if found:
            self.noise_scales.append((self._steps, found[0].estimate().noise_scale))

    def _check_first_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        if self._first_batch is None:
            return
        found = count_examples(batch, None).total
        # a data set may be smaller than a batch
        is_short = found < self._first_batch and batch_idx == 0 and trainer.num_training_batches > 1
        if found > self._first_batch or is_short:
            raise ValueError(
                f"`data` was called with {self._first_batch}, and its first batch holds {found} examples; let it make "
                "batches of the size that it is given, or say with `batch_size_fn` what to count."
            )

    def _look(self, trainer: Trainer) -> None:
        """Read the losses that wait, the mean over all ranks of each, and the examples of all."""
        if not self._waiting:
            return
        device = trainer.strategy.root_device
        losses = torch.stack([loss.double().reshape(()) for loss, _ in self._waiting]).to(device)
        sizes = torch.stack([torch.as_tensor(size, dtype=torch.float64, device=device) for _, size in self._waiting])
        self._waiting = []
        both = torch.stack([losses, sizes])
        if trainer.world_size > 1:
            both = trainer.strategy.reduce(both, reduce_op="mean")
            both[1] *= trainer.world_size
        loss = examples = math.nan
        for loss, examples in both.T.tolist():
            if not math.isfinite(loss):
                self.diverged = True
                break
            self._losses.add(examples=examples, loss=loss)
            self._examples += examples
        self._on_progress(self._examples, loss)


def monitored_value(metrics: Any, monitor: str) -> float:
    """Return a metric by its name.

    Raises:
        ValueError: If there is none of that name.
    """
    if monitor not in metrics:
        raise ValueError(
            f"`monitor={monitor!r}` was not logged in validation; what was: {sorted(metrics)}. Log it in "
            "`validation_step` and pass `val_dataloaders` or a DataModule that has them."
        )
    return float(metrics[monitor])
