"""Gradients of accumulation windows that an epoch's end cut short."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_wn.noise_scale.callback import GradientNoiseScaleCallback
from lightning_wn.trainer_callbacks import callbacks_of


class WindowCount:
    """Counts the micro-batches of a window, so that its gradient can be made their mean.

    Lightning divides every loss by ``accumulate_grad_batches``, also in the last window of an epoch, which may hold
    fewer micro-batches. To be told of the Trainer's hooks of the same names.
    """

    def __init__(self) -> None:
        self._micro_batches = 0

    def on_before_zero_grad(self) -> None:
        """Begin to count."""
        self._micro_batches = 0

    def on_after_backward(self) -> None:
        """Count a micro-batch."""
        self._micro_batches += 1

    def on_before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Make the gradient of a short window the mean of the micro-batches that are there."""
        if not 0 < self._micro_batches < trainer.accumulate_grad_batches:
            return
        factor = trainer.accumulate_grad_batches / self._micro_batches
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
        for callback in callbacks_of(trainer):
            if isinstance(callback, GradientNoiseScaleCallback):
                callback.gradients_were_scaled(factor)
