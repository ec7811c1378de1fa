"""Keeps a model's step-based scheduler over the data of a branch where the base batch size would have it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from fractions import Fraction
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from lightning_wn.callbacks.scheduler_clock import SchedulerClock, step_schedulers
from lightning_wn.noise_scale.batch_counting import BatchSizeFn, count_examples


class PlannedTrainer(Trainer):
    """A Trainer that tells its model how many steps training takes, and does not end for that.

    Both ``trainer.max_steps`` and ``trainer.estimated_stepping_batches`` say it, unless ``max_steps`` is given: that
    is said then, and ends the training.
    """

    plan: Callable[[Trainer], int] | None = None
    """Called when the model asks, which may be before its Trainer has set the data up."""

    @property
    def max_steps(self) -> int:
        """The steps that a model is told."""
        own = super().max_steps
        return own if own != -1 or self.plan is None else self.plan(self)


class BranchSchedule:
    """Steps schedulers over a branch as often as the base batch size does over the same data, epoch by epoch.

    A batch counts as the examples of a whole one, whatever it holds, as it does for the base batch size; the last of
    an epoch counts as what it holds.

    Args:
        batch_size: Examples in an optimizer step of the branch, over all ranks.
        base_batch_size: The same where a scheduler steps once an optimizer step.
        micro_batch: Examples in a whole batch of one rank.
        num_examples: Most examples of the branch.
        resumes: Whether the branch goes on from a checkpoint: then nothing says how long the run is meant to be.
        batch_size_fn: From a batch to its number of examples.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        base_batch_size: float,
        micro_batch: int,
        num_examples: float,
        resumes: bool = False,
        batch_size_fn: BatchSizeFn | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.base_batch_size = base_batch_size
        self.num_examples = num_examples
        self.resumes = resumes
        self._micro_batch = micro_batch
        self._batch_size_fn = batch_size_fn
        self._clock = SchedulerClock(base_batch_size)
        self._in_epoch = 0.0

    def planned_steps(self, trainer: Trainer) -> int:
        """Return the steps of the base batch size over the branch, as far as the data tell the length of an epoch."""
        trainer.fit_loop.setup_data()
        batches = trainer.num_training_batches
        if not 0 < batches < math.inf:
            return self._clock.steps(self.num_examples, math.inf)
        whole = self._micro_batch * trainer.world_size
        return self._clock.steps(self.num_examples, float(whole * (batches - 1 + _last_share(trainer, int(batches)))))

    def require_steps_in_time(self, trainer: Trainer) -> None:
        """Raise ValueError for schedulers that cannot be kept in step with the data."""
        if self.batch_size < self.base_batch_size and step_schedulers(trainer):
            raise ValueError(
                "`batch_sizes` must not go below `base_batch_size` for a model whose learning-rate scheduler steps "
                "with the optimizer: it cannot be held back; leave those sizes out."
            )
        seldom = [c.frequency for c in trainer.lr_scheduler_configs if c.interval == "step" and c.frequency != 1]
        if seldom:
            raise ValueError(
                f"A scheduler that steps with the optimizer must have `frequency` 1 in `configure_optimizers`, got "
                f"{seldom[0]}: only then can it be kept in step with the data."
            )

    def start_epoch(self) -> None:
        """Begin to count the data of an epoch anew."""
        self._in_epoch = 0.0
        self._clock.start_epoch()

    def count(self, trainer: Trainer, batch: Any) -> None:
        """Count a batch of the epoch."""
        if self._is_needed(trainer):
            whole = self._micro_batch * trainer.world_size
            self._in_epoch += min(self._examples_of(trainer, batch), whole) if trainer.is_last_batch else whole

    def make_up(self, trainer: Trainer, pl_module: LightningModule, examples: float) -> None:
        """Step the schedulers as often as they are behind, after an optimizer step; Lightning has stepped them once.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            examples: Those of the branch so far, exact where it is over: the base batch size may have been before.
        """
        if self._is_needed(trainer):
            beyond = examples - self.num_examples
            is_last = trainer.is_last_batch or beyond >= 0
            self._clock.make_up(trainer, pl_module, self._in_epoch - max(beyond, 0.0), is_last=is_last)

    def _is_needed(self, trainer: Trainer) -> bool:
        return self.batch_size != self.base_batch_size and bool(step_schedulers(trainer))

    def _examples_of(self, trainer: Trainer, batch: Any) -> float:
        """Return the examples of a batch over all ranks, which must agree on the steps."""
        here = float(count_examples(batch, self._batch_size_fn).total)
        if trainer.world_size == 1:
            return here
        counts = torch.tensor(here, dtype=torch.float64, device=trainer.strategy.root_device)
        return float(trainer.strategy.reduce(counts, reduce_op="sum"))


def _last_share(trainer: Trainer, batches: int) -> Fraction:
    """Return how full the last batch of an epoch is, as far as its loaders tell."""
    shares = [
        Fraction(len(loader.sampler) - (batches - 1) * loader.batch_size, loader.batch_size)
        for loader in CombinedLoader(trainer.train_dataloader).flattened
        if isinstance(loader, DataLoader) and loader.batch_size and isinstance(loader.sampler, Sized)
    ]
    # where the Trainer or the loader leaves something out the last one is full; a short loader begins again
    return min(max(shares, default=Fraction(1)), Fraction(1))
