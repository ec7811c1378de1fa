"""``measure_critical_batch_size``: trains branches at several batch sizes instead of predicting."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_wn.critical_batch_size.branch import Branch, BranchFiles, BranchPlan
from lightning_wn.critical_batch_size.branch_trainer import BranchTrainer
from lightning_wn.critical_batch_size.conclusion import conclude, cost
from lightning_wn.critical_batch_size.experiment import PowerRule, Sweep, Target
from lightning_wn.critical_batch_size.isolation import expected_warnings_left_out
from lightning_wn.critical_batch_size.progress import MeasurementProgress
from lightning_wn.critical_batch_size.result import CriticalBatchSizeMeasurement, Method
from lightning_wn.critical_batch_size.tuning import Tuned, tune
from lightning_wn.noise_scale.batch_counting import BatchSizeFn

_WORTHWHILE = 1.5
"""A learning rate is given up after 1.5 times the steps of the best; smoothing looks ahead by a fifth of them."""


@expected_warnings_left_out()
def measure_critical_batch_size(
    model: LightningModule | Callable[[], LightningModule],
    data: Any,
    batch_sizes: Iterable[int],
    *,
    num_examples: int,
    directory: str | os.PathLike[str],
    method: Method = "branches",
    target_loss: float | None = None,
    ckpt_path: str | os.PathLike[str] | None = None,
    tolerance: float = 0.01,
    learning_rate: PowerRule = "sqrt",
    base_batch_size: int | None = None,
    tune_learning_rate: float | None = None,
    seeds: Iterable[int] = (0,),
    monitor: str | None = None,
    val_dataloaders: Any = None,
    max_micro_batch: int | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    unit: str = "examples",
    confidence: float = 0.95,
    weights_only: bool = False,
    trainer_kwargs: Mapping[str, Any] | None = None,
    progress_bar: bool = True,
) -> CriticalBatchSizeMeasurement:
    r"""Measure the critical batch size by training short branches, in place of predicting it from the noise scale.

    Every branch starts from the same checkpoint or the same weights and trains at one batch size, with the learning
    rate that goes with it. Two methods:

    - ``"branches"``: all train on the same number of examples; the critical batch size is the largest whose smoothed
      loss is within ``tolerance`` of that at the smallest (Merrill et al. 2025, arXiv 2505.23971: branched training
      from a checkpoint). The noise scale of *now*: what a run can go on with.
    - ``"target_loss"``: each trains until its smoothed loss is at the target. S = S_min (1 + B_crit/B) is fitted to the
      optimizer steps (McCandlish et al. 2018, arXiv 1812.06162, equation 2.11). The noise scale of a *whole run*.

    Branches are trained by Trainers of their own; the model, the data, the checkpoint, the random states and your
    Trainer stay as they were. A finished branch is a file in ``directory`` and is never trained again: call the same
    again after an interruption, or with more batch sizes or seeds. An unfinished branch begins anew, with the same
    seed, so that the result is as if nothing had happened.

    Put a :class:`~lightning_wn.GradientNoiseScaleCallback` into ``trainer_kwargs["callbacks"]``, and the table has what
    it predicts beside what is measured.

    Args:
        model: Copied for each branch. Or a function that makes one: then the seed decides on the weights, too.
        data: Training batches: a DataLoader, anything else that ``Trainer.fit`` takes, or a LightningDataModule; its
            batches are micro-batches, and larger batch sizes come from accumulation. Or a function from the size of a
            micro-batch to one of these, which can make any batch size, and makes large ones fast. DataModules are
            copied for each branch (the data set of a DataLoader is not): a function is better where they hold much.
        batch_sizes: Examples in an optimizer step, over all ranks; best a factor of 2 apart, from well below the noise
            scale to well above.
        num_examples: Examples of a branch; with ``"target_loss"`` it may end before.
        directory: Where finished branches and ``results.csv`` are kept.
        method: ``"branches"`` or ``"target_loss"``.
        target_loss: The training loss to be reached, or the value of ``monitor``; it must fall.
        ckpt_path: A checkpoint file of ``Trainer`` from which all branches go on.
        tolerance: How much more loss counts as none, in the unit of the loss.
        learning_rate: How the learning rate goes with the batch size: ``"sqrt"`` or ``"linear"`` in its ratio, or
            ``"none"``. The factor is there only within the optimizer's step.
        base_batch_size: The batch size that the model's own learning rate is for, and its scheduler, if it steps with
            the optimizer: it makes as many steps over the data as it would at that batch size. None is the smallest.
        tune_learning_rate: A ratio such as 2.0: at each batch size learning rates this ratio apart are tried, until
            the best lies between two worse ones. None takes the rule's alone.
        seeds: Each batch size is trained once with each.
        monitor: A metric of validation in place of the training loss; with ``"target_loss"`` its values between
            validations are interpolated, so let ``trainer_kwargs`` validate often (``val_check_interval``).
        val_dataloaders: For validation, without a DataModule.
        max_micro_batch: Most examples that a rank has room for, where ``data`` is a function.
        batch_size_fn: From a batch to the number of examples that its loss is a mean over.
        unit: The name of what is counted.
        confidence: Level of the intervals.
        weights_only: Whether the checkpoint may hold nothing but tensors and plain values, as ``Trainer.fit`` has it.
        trainer_kwargs: Arguments for the Trainers: devices, precision, callbacks; copied for each branch. With
            ``max_steps`` a model that plans its scheduler with ``trainer.estimated_stepping_batches`` gets the length
            of the run that is meant, in steps of the base batch size; a branch ends before. By default that is the
            branch; behind a checkpoint there is no end.
        progress_bar: Whether bars show how far it is.

    Returns:
        The critical batch size with its interval, and a table.

    Raises:
        ValueError: For arguments out of range or that do not go together, manual optimization, a directory that holds
            another experiment, batch sizes that the data cannot give, and branches that settle nothing.

    Example:
        >>> import tempfile, torch, lightning.pytorch as pl
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> class Regression(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(8, 1)
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.02)
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(2048, 8)
        >>> data_set = TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(2048, 1))
        >>> measurement = measure_critical_batch_size(
        ...     Regression(),
        ...     lambda batch_size: DataLoader(data_set, batch_size, shuffle=True),
        ...     [4, 16, 64],
        ...     num_examples=2048,
        ...     directory=tempfile.mkdtemp(),
        ...     trainer_kwargs={"accelerator": "cpu"},
        ...     progress_bar=False,
        ... )
        >>> [row.steps for row in measurement.batch_sizes]
        [512.0, 128.0, 32.0]
        >>> measurement.lower <= measurement.critical_batch_size <= measurement.upper
        True
    """
    target = Target(
        method=method,
        loss=None if target_loss is None else float(target_loss),
        tolerance=tolerance,
        monitor=monitor,
        confidence=confidence,
        unit=unit,
    )
    sweep = Sweep.of(
        batch_sizes,
        seeds,
        num_examples=num_examples,
        learning_rate=learning_rate,
        base_batch_size=base_batch_size,
        tune_learning_rate=tune_learning_rate,
        fewest_sizes=target.fewest_sizes,
    )
    trainer = BranchTrainer(
        sweep=sweep,
        target=target,
        model=model,
        data=data,
        val_dataloaders=val_dataloaders,
        ckpt_path=None if ckpt_path is None else str(Path(ckpt_path).expanduser()),
        weights_only=weights_only,
        max_micro_batch=max_micro_batch,
        batch_size_fn=batch_size_fn,
        trainer_kwargs=trainer_kwargs or {},
        directory=str(directory),
    )
    files = BranchFiles(directory, trainer.fingerprint())
    shapes = trainer.window_shapes()
    with MeasurementProgress(len(sweep.batch_sizes), sweep.num_examples, shown=progress_bar) as progress:
        measurement = TrainedSweep(trainer, files, shapes, progress).measure()
    files.write_table(measurement.to_csv())
    return measurement


@dataclass(frozen=True)
class TrainedSweep:
    """The branches of a sweep: those that are on disk, and the others trained.

    Attributes:
        trainer: Trains a branch.
        files: Keeps it.
        shapes: By batch size, the examples in a micro-batch and the micro-batches in an optimizer step.
        progress: Shows how far it is.
    """

    trainer: BranchTrainer
    files: BranchFiles
    shapes: Mapping[int, tuple[int, int]]
    progress: MeasurementProgress

    def measure(self) -> CriticalBatchSizeMeasurement:
        """Train each batch size at its best learning rate, and conclude."""
        sweep, target = self.trainer.sweep, self.trainer.target
        tuned: dict[int, Tuned[list[Branch]]] = {}
        exponent = 0  # tuning goes on where the next smaller batch size was best
        for size in sweep.batch_sizes:
            found = tune(partial(self.attempt, size), exponent, fixed=sweep.tune_learning_rate is None)
            tuned[size], exponent = found, found.exponent
            self.progress.size_done()
        chosen = {size: found.outcome for size, found in tuned.items()}
        return conclude(chosen, sweep, target, [size for size, found in tuned.items() if found.at_edge])

    def attempt(self, size: int, exponent: int, best: float) -> tuple[float, list[Branch]]:
        """Return what a learning rate costs, and its branches; ``best`` is the least cost so far."""
        target_loss = self.trainer.target.loss
        # where costs are in steps, a branch need not go much farther than the best
        most_steps = math.inf if target_loss is None else best * _WORTHWHILE
        branches = [self.branch(plan, most_steps) for plan in self.trainer.sweep.plans(size, exponent)]
        return cost(branches, target_loss), branches

    def branch(self, plan: BranchPlan, most_steps: float) -> Branch:
        """Return a finished branch, or train it."""
        found = self.files.load(plan)
        # one that was given up early may have to go farther now: with other seeds, or without tuning
        if found is None or (found.given_up is not None and found.given_up < most_steps):
            micro_batch, accumulate = self.shapes[plan.batch_size]
            found = self.trainer.run(
                plan,
                micro_batch=micro_batch,
                accumulate=accumulate,
                most_steps=most_steps,
                on_progress=self.progress.branch(plan.name),
            )
            self.files.keep(found)
        return found
