"""How many examples or tokens a run has trained on, over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_wn.noise_scale.batch_counting import BatchSizeFn, count_examples


class TrainedOn:
    """Counts what batches hold, on each rank for itself until the ranks are asked.

    Args:
        batch_size_fn: From a batch to its number of examples or tokens; None is the common first dimension.

    Attributes:
        total: What was counted over all ranks, as of the last :meth:`pool`.
    """

    def __init__(self, batch_size_fn: BatchSizeFn | None) -> None:
        self.total = 0.0
        self._batch_size_fn = batch_size_fn
        self._here: float | Tensor = 0.0

    def see(self, batch: Any) -> None:
        """Count a batch of this rank."""
        self._here = self._here + count_examples(batch, self._batch_size_fn).total

    def pool(self, trainer: Trainer, *, together: bool) -> None:
        """Add what was counted since the last time, over all ranks; without them, as if all had counted the same."""
        counted = float(self._here)
        self._here = 0.0
        if trainer.world_size > 1:
            replicas = trainer.strategy.distributed_sampler_kwargs["num_replicas"]  # type: ignore[attr-defined]  # of all with ranks
            if together:
                here = torch.tensor(counted, dtype=torch.float64, device=trainer.strategy.root_device)
                counted = float(trainer.strategy.reduce(here, reduce_op="sum")) / trainer.world_size
            # ranks of tensor parallelism share their batches
            counted *= replicas
        self.total += counted
