"""What the callback and its probes have to know of a Lightning run."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn


def trainable_parameters(trainer: Trainer) -> list[nn.Parameter]:
    """Return the parameters that the optimizer moves; fine-tuning callbacks change them in mid-run."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]


def loss_scale(trainer: Trainer, device: torch.device) -> Tensor | None:
    """Return the gradient scaler's factor, on the device; `get_scale()` would wait for it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones((), device=device))


def log_interval(trainer: Trainer) -> int:
    """Return ``Trainer(log_every_n_steps=...)``; 0 is never."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set outside Trainer.__init__


def largest_accumulation(trainer: Trainer) -> int:
    """Return the most micro-batches per optimizer step that the run is known to reach."""
    factors = [trainer.accumulate_grad_batches]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set outside Trainer.__init__
        if isinstance(callback, GradientAccumulationScheduler):
            factors += callback.scheduling.values()
    return max(factors)


def require_dense_gradients(pl_module: LightningModule) -> None:
    """Raise ValueError where an embedding gives sparse gradients, whose norms no probe reads."""
    for name, module in pl_module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(
                f"`GradientNoiseScaleCallback` cannot read sparse gradients, and {name!r} was built with "
                "`sparse=True`; build it with `sparse=False`."
            )
