"""Which Lightning strategies a probe can read."""

from __future__ import annotations

from typing import Literal

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
