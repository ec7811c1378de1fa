"""Lets step-based learning-rate schedulers run over the data as if the batch size had never changed."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer


class SchedulerClock:
    """Makes up for the scheduler steps that optimizer steps of more micro-batches leave out.

    Lightning steps a scheduler of ``interval="step"`` once an optimizer step. One that was planned with
    ``trainer.estimated_stepping_batches`` would never come to its end once steps become larger and fewer. At every
    moment the schedulers have stepped here as often as they would have with the first accumulation factor.

    Args:
        first: The first accumulation factor.

    Example:
        >>> clock = SchedulerClock(first=2)
        >>> [clock.owed(batches, is_last=batches == 10) for batches in (2, 6, 10)]  # windows of 2, 4 and 4
        [0, 1, 1]
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.in_epoch = 0
        """Steps of this epoch that the first factor would have made so far."""
        self.behind = 0
        """How many fewer the schedulers have made; negative where the batch size went below the first."""

    def start_epoch(self) -> None:
        """Begin to count the batches of an epoch anew."""
        self.in_epoch = 0

    def owed(self, batches: int, *, is_last: bool) -> int:
        """Return the scheduler steps to make up for after an optimizer step, for which one was made already.

        Args:
            batches: Batches of this epoch so far.
            is_last: Whether the epoch ends here, where a short window ends, too.
        """
        in_epoch = math.ceil(batches / self.first) if is_last else batches // self.first
        self.behind += in_epoch - self.in_epoch - 1
        self.in_epoch = in_epoch
        owed = max(self.behind, 0)
        self.behind -= owed
        return owed

    def make_up(self, trainer: Trainer, pl_module: LightningModule, batches: int, *, is_last: bool) -> None:
        """Step the schedulers as often as they are behind."""
        for _ in range(self.owed(batches, is_last=is_last)):
            for config in step_schedulers(trainer):
                pl_module.lr_scheduler_step(config.scheduler, None)


def step_schedulers(trainer: Trainer) -> list[Any]:
    """Return the configurations of the schedulers that Lightning steps once an optimizer step."""
    return [
        config
        for config in trainer.lr_scheduler_configs
        if config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
    ]
