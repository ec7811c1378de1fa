"""Measurements of few and short branches, and the same training written by hand."""

from __future__ import annotations

import json

import lightning as L
import torch
from helpers.adaptive_runs import OPTIMIZERS, SCHEDULERS, Model, batches_in_order
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import measure_critical_batch_size
from lightning_wn.critical_batch_size.branch import Branch

DOUBLE = {"progress_bar": False, "trainer_kwargs": {"accelerator": "cpu", "precision": "64-true"}}


class Watched(Model):
    """Counts training steps over all copies."""

    training_steps = 0

    def training_step(self, batch, batch_idx):
        Watched.training_steps += 1
        return super().training_step(batch, batch_idx)


class Falls(L.LightningModule):
    """Its loss is a weight that falls by the learning rate in every step, whatever the batch."""

    def __init__(self, seen=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.log("height", self.weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def noise(size):
    return DataLoader(torch.zeros(10_000, 1), size)


def measure(directory, model=None, data=None, sizes=(16, 32, 64), **arguments):
    arguments = DOUBLE | {"num_examples": 320, "directory": directory} | arguments
    model = Model() if model is None else model  # a compiled one has no truth value
    return measure_critical_batch_size(model, data or batches_in_order(160), sizes, **arguments)


def curves(directory):
    """From batch size and learning-rate factor to the branch."""
    files = [json.loads(path.read_text()) for path in sorted((directory / "branches").glob("*.json"))]
    branches = [Branch.from_dict(values) for values in files]
    return {(branch.plan.batch_size, branch.plan.learning_rate_factor): branch for branch in branches}


def curves_by_seed(directory, size):
    """From the seed to the branch of a batch size."""
    files = [json.loads(path.read_text()) for path in (directory / "branches").glob(f"batch_{size}_*.json")]
    return {branch.plan.seed: branch for branch in map(Branch.from_dict, files)}


def losses_by_hand(model, micro_batches, windows, rate):
    """Mean losses of windows before their update, with the learning rate times ``rate`` within the step.

    The scheduler makes a step for each micro-batch: the base batch size is one.
    """
    optimizer = OPTIMIZERS[model.optimizer](model.parameters())
    scheduler = SCHEDULERS[model.scheduler](optimizer) if model.scheduler else None
    batches = iter(micro_batches)
    found = []
    for length in windows:
        optimizer.zero_grad()
        losses = [nn.functional.cross_entropy(model(x), y) for x, y in (next(batches) for _ in range(length))]
        mean = torch.stack(losses).mean()
        mean.backward()
        own = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = own * rate
        optimizer.step()
        optimizer.param_groups[0]["lr"] = own
        for _ in range(length if scheduler else 0):
            scheduler.step()
        found.append(float(mean.detach()))
    return found
