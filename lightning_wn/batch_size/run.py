"""What makes up the batch size of a run, and what else advice can use of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_wn.batch_size.learning_rate import OptimizerFamily


@dataclass(frozen=True, kw_only=True)
class RunConfiguration:
    """What makes up the batch size of a run.

    Attributes:
        accumulate_grad_batches: Micro-batches per optimizer step on each rank; None where it is not known, as in
            logs, so that only whole batch sizes can be spoken of.
        num_ranks: Data-parallel ranks.
    """

    accumulate_grad_batches: int | None = 1
    num_ranks: int = 1

    def smallest_of(self, batch_size: float) -> float:
        """Return what one micro-batch on every rank holds of the run's batch size; NaN where that is not known."""
        return batch_size / (self.accumulate_grad_batches or math.nan)

    def ranks_for(self, accumulate_grad_batches: int | None) -> int:
        """Return the ranks that make up for another accumulation with the present one; 0 where none do.

        Example:
            >>> configuration = RunConfiguration(accumulate_grad_batches=4, num_ranks=2)
            >>> configuration.ranks_for(16), configuration.ranks_for(5)
            (8, 0)
        """
        if accumulate_grad_batches is None or self.accumulate_grad_batches is None:
            return 0
        ranks, rest = divmod(accumulate_grad_batches * self.num_ranks, self.accumulate_grad_batches)
        return 0 if rest else ranks


@dataclass(frozen=True, kw_only=True)
class ObservedRun:
    """What advice on the batch size can use of a run.

    Attributes:
        optimizer: The optimizer's class.
        optimizer_family: Whether it is like SGD or like Adam; None where it is like neither, or not known.
        learning_rate_rises: Whether the learning rate was higher after the last step than before: a warm-up.
        num_steps: Optimizer steps so far; None where they were not counted.
        planned_steps: Optimizer steps that the run takes in all; infinite where it has no end of its own.
        micro_batches_per_epoch: On one rank; infinite where an epoch has no end.
        every_n_steps: One in so many optimizer steps is measured.
        ema_decay: Weight of the past per measurement; NaN where it is not known, as from logs.
        time: What micro-batches and optimizer steps take; None while it is not known.
    """

    optimizer: str = ""
    optimizer_family: OptimizerFamily | None = None
    learning_rate_rises: bool = False
    num_steps: int | None = None
    planned_steps: float = math.inf
    micro_batches_per_epoch: float = math.inf
    every_n_steps: int = 1
    ema_decay: float = 1.0
    time: RunTime | None = None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run if it has an end, else those so far."""
        return int(self.planned_steps) if math.isfinite(self.planned_steps) else self.num_steps


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """What one optimizer step of a run takes: ``accumulate_grad_batches`` micro-batches and one step.

    Attributes:
        micro_batch_seconds: Time of one micro-batch on one rank, with the loading of its data.
        step_seconds: Time of what happens once in an optimizer step: the optimizer and, where a step has several
            micro-batches, the communication of gradients. 0 where it cannot be told apart.
        is_split: Whether the two were told apart.
        includes_measuring: Whether only steps were seen in which the noise scale was measured.
        num_steps: Optimizer steps behind the numbers.

    Example:
        >>> RunTime(micro_batch_seconds=0.2, step_seconds=0.1, num_steps=50).seconds(4)
        0.9
    """

    micro_batch_seconds: float
    step_seconds: float
    is_split: bool = True
    includes_measuring: bool = False
    num_steps: int

    def seconds(self, accumulate_grad_batches: float) -> float:
        """Return the time of an optimizer step with so many micro-batches."""
        return accumulate_grad_batches * self.micro_batch_seconds + self.step_seconds
