"""Counts what an optimizer step communicates and reads."""

from __future__ import annotations

import torch
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
