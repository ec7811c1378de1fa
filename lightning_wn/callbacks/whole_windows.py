"""What callbacks have in common that train with other batch sizes than the Trainer was made for."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_wn.callbacks.noise_scale.callback import GradientNoiseScaleCallback
from lightning_wn.callbacks.scaled_learning_rate import ScaledLearningRate
from lightning_wn.trainer import callbacks_of, has_loss_scaler


class WholeWindows(Callback):
    """Makes every gradient the mean of its window's micro-batches, and has a factor on the learning rate in the step.

    Lightning divides every loss by ``accumulate_grad_batches``, also in the last window of an epoch, which may hold
    fewer micro-batches. A subclass takes hold of the optimizer when training starts, and lets go of it at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scaled: ScaledLearningRate | None = None
        self._micro_batches = 0
        self._stepped = False

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin to count the micro-batches of a window."""
        self._micro_batches = 0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count a micro-batch of the window."""
        self._micro_batches += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Make a short window's gradient a mean, and let the learning rate's factor in."""
        self._stepped = True
        if 0 < self._micro_batches < trainer.accumulate_grad_batches:
            _rescale(trainer, optimizer, trainer.accumulate_grad_batches / self._micro_batches)
        assert self._scaled is not None
        if not self._scaled.in_step and not has_loss_scaler(trainer):
            raise RuntimeError(
                f"`{type(self).__name__}` cannot put a factor on the learning rate of {type(optimizer).__name__}, "
                "whose step runs no hooks; let it call `torch.optim.Optimizer.__init__`."
            )
        self._scaled.gradient_is_ready()

    def _take_hold_of_optimizer(self, optimizer: Optimizer, factor: float) -> None:
        self._scaled = ScaledLearningRate(optimizer)
        self._scaled.factor = factor

    def _let_go_of_optimizer(self) -> None:
        if self._scaled is not None:
            self._scaled.detach()
        self._scaled = None


def _rescale(trainer: Trainer, optimizer: Optimizer, factor: float) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientNoiseScaleCallback):
            callback.gradients_were_scaled(factor)
