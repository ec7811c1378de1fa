"""What probes need of a run: one sentence each, with the fix, where it is not so."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_wn.noise_scale.norms import require_dense
from lightning_wn.weight_norm.core.mean_only_batch_norm import MeanOnlyBatchNorm

Placement = Literal["replicated", "sharded"]

# the nearest of these classes decides, so that a subclass of DDP by the user is DDP, and DeepSpeed is not
_PLACEMENT: dict[type[Strategy], Placement | None] = {
    SingleDeviceStrategy: "replicated",
    DDPStrategy: "replicated",
    ModelParallelStrategy: "sharded",
    SingleDeviceXLAStrategy: None,
    XLAStrategy: None,
    DeepSpeedStrategy: None,
    FSDPStrategy: None,
}


def parameter_placement(strategy: Strategy) -> Placement:
    """Return whether each rank holds all parameters or a shard of them.

    Raises:
        ValueError: If no probe can read gradients under this strategy.
    """
    nearest = next((base for base in type(strategy).__mro__ if base in _PLACEMENT), None)
    placement = _PLACEMENT[nearest] if nearest else None
    if placement is None:
        raise ValueError(
            f"`GradientNoiseScaleCallback` cannot read per-rank gradients under {type(strategy).__name__}; use a "
            "single device, one of Lightning's DDP strategies (`strategy='ddp'`, 'ddp_spawn', 'ddp_fork', "
            "'ddp_notebook') or ModelParallelStrategy with FSDP2, or remove the callback."
        )
    return placement


def require_one_device(trainer: Trainer, probe: str) -> None:
    """Raise ValueError on several ranks, whose gradients are better samples than those of such a probe."""
    if trainer.world_size > 1:
        raise ValueError(
            f"`probe={probe!r}` is for one device, and this run has {trainer.world_size} ranks, whose gradients are "
            "exact samples; use `probe='auto'`."
        )


def require_independent_ranks(trainer: Trainer, pl_module: LightningModule, *, may_convert: bool) -> None:
    """Raise ValueError where batch statistics mix the examples of several ranks.

    Args:
        trainer: The Trainer.
        pl_module: The model.
        may_convert: Whether the strategy follows ``Trainer(sync_batchnorm=True)``, which turns every batch norm into
            SyncBatchNorm only later, when the model is wrapped.
    """
    if trainer.world_size < 2:
        return
    will_sync = may_convert and getattr(trainer.strategy, "_layer_sync", None) is not None
    synced = nn.modules.batchnorm._BatchNorm if will_sync else nn.SyncBatchNorm
    for name, module in pl_module.named_modules():
        if isinstance(module, synced):
            raise ValueError(
                f"`GradientNoiseScaleCallback` needs independent ranks, and SyncBatchNorm in {name!r} mixes their "
                "examples; use `Trainer(sync_batchnorm=False)` with BatchNorm, or a normalization without batch "
                "statistics."
            )
        if isinstance(module, MeanOnlyBatchNorm) and module.synchronize:
            raise ValueError(
                f"`GradientNoiseScaleCallback` needs independent ranks, and synchronized means in {name!r} mix "
                "their examples; leave `synchronize` (`mean_only_synchronize`) False: each rank then takes its own."
            )


def require_dense_gradients(pl_module: LightningModule) -> None:
    """Raise ValueError where an embedding gives sparse gradients, whose norms no probe reads, or a weight is sparse."""
    for name, module in pl_module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(
                f"`GradientNoiseScaleCallback` cannot read sparse gradients, and {name!r} was built with "
                "`sparse=True`; build it with `sparse=False`."
            )
    for parameter in pl_module.parameters():
        if not isinstance(parameter, UninitializedParameter):
            require_dense(parameter)
