"""What the callback and its probes have to know of a Lightning run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_wn.trainer_callbacks import callbacks_of
from lightning_wn.weight_norm.mean_only_batch_norm import MeanOnlyBatchNorm

_SYNC_STEPS_WITHOUT_LOGGING = 50


def loss_scale(trainer: Trainer, device: torch.device) -> Tensor | None:
    """Return the gradient scaler's factor, on the device; `get_scale()` would wait for it."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones((), device=device))


def has_loss_scaler(trainer: Trainer) -> bool:
    """Whether gradients carry the factor of a scaler during backward."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def log_interval(trainer: Trainer) -> int:
    """Return ``Trainer(log_every_n_steps=...)``; 0 is never."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set outside Trainer.__init__


def first_accumulation(trainer: Trainer) -> int:
    """Return the micro-batches of the first optimizer step, as far as it is known before training starts."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return int(callback.get_accumulate_grad_batches(trainer.current_epoch))
    return int(trainer.accumulate_grad_batches)


def step_to_log(trainer: Trainer) -> int:
    """Return the step that Lightning writes beside its own metrics of this batch, as its callbacks do."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_log_step(trainer: Trainer) -> bool:
    """Whether estimates are synchronised and logged after this batch, which ended an optimizer step."""
    return (step_to_log(trainer) + 1) % (log_interval(trainer) or _SYNC_STEPS_WITHOUT_LOGGING) == 0


def largest_accumulation(trainer: Trainer) -> int:
    """Return the most micro-batches per optimizer step that the run is known to reach."""
    factors = [trainer.accumulate_grad_batches]
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            factors += callback.scheduling.values()
    return max(factors)


def training_step_output(model: LightningModule, batch: Any, batch_idx: int) -> Any:
    """Return what ``training_step`` gives; its ``batch_idx`` is optional, as it is for the Trainer."""
    step: Any = model.training_step
    return step(batch, batch_idx) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)


def require_independent_ranks(trainer: Trainer, pl_module: LightningModule, *, may_convert: bool) -> None:
    """Raise ValueError where batch statistics mix the examples of several ranks.

    Args:
        trainer: The Trainer.
        pl_module: The model.
        may_convert: Whether the strategy follows ``Trainer(sync_batchnorm=True)``, which turns every batch norm into
            SyncBatchNorm only later, when the model is wrapped.
    """
    will_sync = may_convert and getattr(trainer.strategy, "_layer_sync", None) is not None
    synced = (nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm) if will_sync else (nn.SyncBatchNorm,)
    for name, module in pl_module.named_modules():
        if trainer.world_size > 1 and isinstance(module, synced):
            raise ValueError(
                f"`GradientNoiseScaleCallback` needs independent ranks, and SyncBatchNorm in {name!r} mixes their "
                "examples; use `Trainer(sync_batchnorm=False)` with BatchNorm, or a normalization without batch "
                "statistics."
            )
        if trainer.world_size > 1 and isinstance(module, MeanOnlyBatchNorm) and module.synchronize:
            raise ValueError(
                f"`GradientNoiseScaleCallback` needs independent ranks, and synchronized means in {name!r} mix "
                "their examples; leave `synchronize` (`mean_only_synchronize`) False: each rank then takes its own."
            )


def require_dense_gradients(pl_module: LightningModule) -> None:
    """Raise ValueError where an embedding gives sparse gradients, whose norms no probe reads."""
    for name, module in pl_module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(
                f"`GradientNoiseScaleCallback` cannot read sparse gradients, and {name!r} was built with "
                "`sparse=True`; build it with `sparse=False`."
            )
