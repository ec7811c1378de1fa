"""The curvature-weighted noise scale while a model trains, on a copy of it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_wn.noise_scale.batch_counting import BatchSizeFn, count_examples
from lightning_wn.noise_scale.curvature import curvature_samples
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.metric import GradientNoiseScale
from lightning_wn.probes.requirements import parameter_placement
from lightning_wn.trainer import copy_without_trainer, training_step_output

CURVATURE = "curvature"
_GRADIENT_BATCHES = 4


class CurvatureMeasurement:
    """Keeps a few successive batches every so many steps, and measures gᵀHg on them at the present weights.

    A copy of the model computes the losses, in full precision and with ``log`` silenced, so training does not notice:
    no gradient, buffer, metric or random number of it is touched. Each rank measures on its own batches.

    Args:
        every_n_steps: Optimizer steps from one measurement to the next.
        metric: Takes the samples.
    """

    def __init__(self, every_n_steps: int, metric: GradientNoiseScale) -> None:
        self.every_n_steps = every_n_steps
        self.metric = metric
        self._batches: list[tuple[Any, int, float | Tensor]] = []
        self._last_step = -1

    def estimate(self) -> NoiseScaleEstimate:
        """Return the estimate: ``grad_sq_norm`` is GᵀHG, ``cov_trace`` is tr(HΣ)."""
        return self.metric.last_estimate(probe=CURVATURE)

    def require_measurable(self, trainer: Trainer, model: LightningModule) -> None:
        """Raise ValueError where no copy of the model can compute the loss."""
        if parameter_placement(trainer.strategy) == "sharded":
            raise ValueError(
                f"`curvature_every_n_steps` needs a whole copy of the model on each rank, and "
                f"{type(trainer.strategy).__name__} shards it; use DDP, or `curvature_every_n_steps=None`."
            )
        if not model.automatic_optimization:
            raise ValueError(
                "`curvature_every_n_steps` needs the loss that `training_step` returns, and "
                f"{type(model).__name__} sets `automatic_optimization = False`; use automatic optimization, or "
                "`curvature_every_n_steps=None`."
            )

    def see_batch(
        self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int, batch_size_fn: BatchSizeFn | None
    ) -> None:
        """Keep the batch if a measurement is due, and measure when there are enough."""
        step = trainer.global_step
        if not self._batches:
            if step % self.every_n_steps != 0 or step == self._last_step:
                return
            self._last_step = step
        self._batches.append((batch, batch_idx, count_examples(batch, batch_size_fn).total))
        if len(self._batches) > _GRADIENT_BATCHES:
            self._measure(trainer, model)
            self.forget_batches()

    def forget_batches(self) -> None:
        """Drop what waits for a measurement."""
        self._batches = []

    def _measure(self, trainer: Trainer, model: LightningModule) -> None:
        copied = copy_without_trainer(model).train()
        # what it reads of the Trainer is there; what it would log is not
        copied.trainer = trainer
        copied.__dict__["log"] = copied.__dict__["log_dict"] = lambda *args, **kwargs: None
        parameters = [p for p in copied.parameters() if p.requires_grad]
        losses = [(partial(_loss, copied, batch, index), size) for batch, index, size in self._batches]
        devices = [model.device] if model.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(model.device.type, enabled=False),
            # the other ranks leave the same batch out, or training would not go on
            contextlib.suppress(_SkippedError),
        ):
            samples = curvature_samples(parameters, losses[0][0], losses[1:])
            # the step has as many examples on each rank
            samples = replace(samples, examples=samples.sizes[0] * trainer.world_size, micro_batches=trainer.world_size)
            self.metric.add_samples(samples, rank=trainer.global_rank, ranks=trainer.world_size)


class _SkippedError(Exception):
    """`training_step` returned None, which leaves its batch out."""


def _loss(model: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    output = training_step_output(model, batch, batch_idx)
    loss: Tensor | None = output.get("loss") if isinstance(output, dict) else output
    if loss is None:
        raise _SkippedError
    return loss
