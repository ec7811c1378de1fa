"""Counts what an optimizer step communicates and reads."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from helpers.frozen_digits import digits, loader
from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """Counts collectives and host reads per optimizer step."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer
        self.counts: dict[int, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        entry = self.counts.setdefault(self.trainer.global_step, [0, 0])
        entry[0] += func.namespace in ("c10d", "_c10d_functional")
        entry[1] += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def count_with_and_without(
    trainer: Callable[[list[L.Callback]], L.Trainer],
    model: Callable[[], L.LightningModule],
    callback: Callable[[], L.Callback],
    *,
    steps: int,
) -> list[list[list[int]]]:
    """What each optimizer step of two runs on the digits took, without a callback and with it."""
    found = []
    for callbacks in ([], [callback()]):
        run = trainer(callbacks)
        counter = CountOps(run)
        with counter:
            run.fit(model(), loader(digits()))
        found.append([counter.counts.get(step, [0, 0]) for step in range(steps)])
    return found
