"""Which Lightning strategies a probe can read."""

from __future__ import annotations

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

# the nearest of these classes decides, so that a subclass of DDP by the user is DDP, and DeepSpeed is not
_READABLE: dict[type[Strategy], bool] = {
    SingleDeviceStrategy: True,
    DDPStrategy: True,
    SingleDeviceXLAStrategy: False,
    XLAStrategy: False,
    DeepSpeedStrategy: False,
    FSDPStrategy: False,
    ModelParallelStrategy: False,
}


def require_readable_strategy(strategy: Strategy) -> None:
    """Raise ValueError unless micro-batch gradients can be read under this strategy."""
    nearest = next((base for base in type(strategy).__mro__ if base in _READABLE), None)
    if nearest is None or not _READABLE[nearest]:
        raise ValueError(
            f"`GradientNoiseScaleCallback` cannot read per-rank gradients under {type(strategy).__name__}; use a "
            "single device or one of Lightning's DDP strategies (`strategy='ddp'`, 'ddp_spawn', 'ddp_fork', "
            "'ddp_notebook'), or remove the callback."
        )
