"""Measurements in processes of their own: ``python critical_batch_size.py FOLDER NAME``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch
from helpers.adaptive_runs import Model
from helpers.frozen_digits import digits
from helpers.processes import LIMIT
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_wn import CriticalBatchSizeMeasurement, measure_critical_batch_size

SIZES = (16, 32, 64)


class MayWait(Model):
    """Waits in the middle of the second branch, for the one who comes to kill it."""

    waits: Path | None = None

    def training_step(self, batch, batch_idx):
        if self.waits and len(batch[0]) == 32 and batch_idx == 10:
            self.waits.touch()
            time.sleep(LIMIT)
        return super().training_step(batch, batch_idx)


def measure(directory: Path, **trainer_kwargs) -> CriticalBatchSizeMeasurement:
    """Three branches of 640 digits in an order of the seed's."""
    settings = {"accelerator": "cpu", "precision": "64-true"} | trainer_kwargs
    data = digits(640, torch.float64)
    return measure_critical_batch_size(
        MayWait("adam"),
        lambda size: DataLoader(data, size, shuffle=True),
        SIZES,
        num_examples=640,
        directory=directory,
        trainer_kwargs=settings,
        progress_bar=False,
    )


def is_killed():
    """The second branch never ends."""
    MayWait.waits = FOLDER / "waits"
    measure(FOLDER / "cut")


def two_ranks():
    """Micro-batches of half the batch on each of two ranks."""
    found = measure(FOLDER / "two", strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    again = measure(FOLDER / "two", strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    (FOLDER / f"rank{rank}.json").write_text(json.dumps([found.to_dict(), again.to_dict()]))


class Counts(Model):
    """Writes down optimizer steps and scheduler steps of each branch, and the steps that it was told."""

    made: ClassVar[list[list[int]]] = []
    told: ClassVar[list[float]] = []

    def configure_optimizers(self):
        self.told.append(self.trainer.estimated_stepping_batches)
        return super().configure_optimizers()

    def on_train_end(self):
        steps = self.trainer.global_step
        size = self.trainer.callbacks[-1].schedule.batch_size
        self.made.append([size, steps, self.lr_schedulers().last_epoch])


def schedulers():
    """Epochs of 100 that end with short batches, and with short windows of micro-batches of 8 on each rank."""
    data = digits(100, torch.float64)
    for name, loaders in (("made", lambda size: DataLoader(data, size)), ("given", DataLoader(data, 8))):
        measure_critical_batch_size(
            Counts("momentum", "lambda"),
            loaders,
            SIZES,
            num_examples=250,
            directory=FOLDER / name,
            trainer_kwargs={
                "accelerator": "cpu",
                "precision": "64-true",
                "strategy": DDPStrategy(process_group_backend="gloo"),
                "devices": 2,
            },
            progress_bar=False,
        )
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    (FOLDER / f"schedulers{rank}.json").write_text(json.dumps({"made": Counts.made, "told": Counts.told}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER = Path(sys.argv[1])
    {"is_killed": is_killed, "two_ranks": two_ranks, "schedulers": schedulers}[sys.argv[2]]()
