"""Runs under AdaptiveBatchSizeCallback, and the same training written by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from helpers.frozen_digits import DigitsMLP, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}

SCHEDULERS: dict[str, Callable[..., Any]] = {
    # one that computes from the present rate, so that a factor left in it would show, and one that does not
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step)),
}


class Model(DigitsMLP):
    """DigitsMLP in float64 with an optimizer and a step-based scheduler by name."""

    def __init__(self, optimizer: str = "momentum", scheduler: str | None = None) -> None:
        super().__init__()
        self.double()
        self.optimizer, self.scheduler = optimizer, scheduler

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": SCHEDULERS[self.scheduler](optimizer), "interval": "step"}]


def batches_in_order(count: int = 165, batch_size: int = 16) -> DataLoader:
    """165 digits are 11 micro-batches, the last one of 5."""
    return DataLoader(digits(count, torch.float64), batch_size)


class Factors(L.Callback):
    """Writes down the factor of every batch, epoch by epoch; after the adaptive callback in the list."""

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 or not self.epochs:
            self.epochs.append([])
        self.epochs[-1].append(trainer.accumulate_grad_batches)


def train_by_hand(
    model: Model,
    data: Sequence[Any],
    windows: Sequence[Sequence[int]],
    rates: Sequence[Sequence[float]],
    *,
    steps_per_window: Callable[[int], int] = lambda batches: 1,
    clip: float | None = None,
    loss: Callable[[Model, Any], Tensor] | None = None,
) -> None:
    """Train on mean gradients of whole windows.

    Args:
        model: The model.
        data: The micro-batches of an epoch.
        windows: Lengths of the windows of every epoch.
        rates: Factors on the learning rate of every window.
        steps_per_window: From the micro-batches of a window to the steps of the scheduler after it.
        clip: Largest norm of the gradient.
        loss: Of a micro-batch.
    """
    loss = loss or (lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
    optimizer = OPTIMIZERS[model.optimizer](model.parameters())
    scheduler = SCHEDULERS[model.scheduler](optimizer) if model.scheduler else None
    for lengths, factors in zip(windows, rates, strict=True):
        micro_batches = iter(data)
        for length, factor in zip(lengths, factors, strict=True):
            optimizer.zero_grad()
            mean = sum(loss(model, next(micro_batches)) for _ in range(length)) / length
            mean.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            own = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = own * factor
            optimizer.step()
            optimizer.param_groups[0]["lr"] = own
            for _ in range(steps_per_window(length) if scheduler else 0):
                scheduler.step()
        assert next(micro_batches, None) is None


def changes_in(epochs: Sequence[Sequence[int]]) -> int:
    """How often the factor changed, also from one epoch to the next."""
    return sum(old != new for old, new in itertools.pairwise(itertools.chain(*epochs)))


def starts_of(factors: Sequence[int]) -> list[int]:
    """Where the windows of an epoch start."""
    return [0, *itertools.accumulate(windows_of(factors)[:-1])]


def windows_of(factors: Sequence[int]) -> list[int]:
    """Lengths of the windows of an epoch with these factors; a window that is cut in its middle is an error."""
    lengths, index = [], 0
    while index < len(factors):
        length = min(factors[index], len(factors) - index)
        assert set(factors[index : index + length]) == {factors[index]}
        assert index % factors[index] == 0
        lengths.append(length)
        index += length
    return lengths
