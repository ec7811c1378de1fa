"""Lets step-based learning-rate schedulers run over the data as if the batch size were another."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer


class SchedulerClock:
    """Makes up for the scheduler steps that larger and fewer optimizer steps leave out.

    Lightning steps a scheduler of ``interval="step"`` once an optimizer step. One that was planned with
    ``trainer.estimated_stepping_batches`` would never come to its end once steps become larger and fewer. At every
    moment the schedulers have stepped here as often as they would have with the first batch size.

    Args:
        first: The first batch size, in what positions count: micro-batches, or examples.
    """

    def __init__(self, first: float) -> None:
        self.first = first
        self.in_epoch = 0
        """Steps of this epoch that the first batch size would have made so far."""
        self.behind = 0
        """How many fewer the schedulers have made; negative where the batch size went below the first."""

    def start_epoch(self) -> None:
        """Begin to count the data of an epoch anew."""
        self.in_epoch = 0

    def owed(self, position: float, *, is_last: bool) -> int:
        """Return the scheduler steps to make up for after an optimizer step, for which one was made already.

        Args:
            position: How far the epoch is: its micro-batches, or examples, so far.
            is_last: Whether the epoch ends here, where a short window ends, too.
        """
        windows = position / self.first
        in_epoch = math.ceil(windows) if is_last else math.floor(windows)
        self.behind += in_epoch - self.in_epoch - 1
        self.in_epoch = in_epoch
        owed = max(self.behind, 0)
        self.behind -= owed
        return owed

    def make_up(self, trainer: Trainer, pl_module: LightningModule, position: float, *, is_last: bool) -> None:
        """Step the schedulers as often as they are behind."""
        for _ in range(self.owed(position, is_last=is_last)):
            for config in step_schedulers(trainer):
                pl_module.lr_scheduler_step(config.scheduler, None)

    def steps(self, length: float, epoch: float) -> int:
        """Return how many steps there will be.

        Args:
            length: Of the training, in what positions count.
            epoch: The same of an epoch.
        """
        if epoch >= length:
            return math.ceil(length / self.first)
        whole, rest = divmod(length, epoch)
        return int(whole) * math.ceil(epoch / self.first) + math.ceil(rest / self.first)


def step_schedulers(trainer: Trainer) -> list[Any]:
    """Return the configurations of the schedulers that Lightning steps once an optimizer step."""
    return [
        config
        for config in trainer.lr_scheduler_configs
        if config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
    ]
