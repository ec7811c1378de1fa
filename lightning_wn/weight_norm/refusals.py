"""What the callback cannot do with a Trainer, its strategy and its other callbacks, said before training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from lightning_wn.trainer_callbacks import callbacks_of
from lightning_wn.weight_norm.chains import is_sharded, weight_norm_chains
from lightning_wn.weight_norm.mean_only_batch_norm import MeanOnlyBatchNorm

# callbacks of Lightning that copy the model in their own `setup`, and later pair parameters by position
_COPIES_MODEL = ("WeightAveraging", "StochasticWeightAveraging")


def _is_lightnings(callback: Callback, names: Sequence[str]) -> bool:
    """Tell whether this is a callback of Lightning that has one of these names, or comes of one."""
    bases = [cls for cls in type(callback).__mro__ if cls.__module__.startswith("lightning.")]
    return any(cls.__name__ in names for cls in bases)


def refuse_sharding(trainer: pl.Trainer) -> None:
    """Raise under strategies whose parameters have no norms of units."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"Weight normalization does not work with {type(trainer.strategy).__name__}, which shards or "
            "flattens the parameters of which the norms are taken: use a single device or a DDP strategy."
        )


def refuse_sharded_form(module: nn.Module, checkpoint: str, init: str, *, fold_on_fit_end: bool) -> None:
    """Raise if parameters are sharded and the callback is asked for what they cannot give.

    Args:
        module: The model.
        checkpoint: The callback's argument.
        init: The callback's argument.
        fold_on_fit_end: The callback's argument.
    """
    chains = [chain for layer in module.modules() for chain in weight_norm_chains(layer).values()]
    if not any(map(is_sharded, chains)):
        return
    if checkpoint == "folded" or fold_on_fit_end:
        argument = "fold_on_fit_end=True" if fold_on_fit_end else 'checkpoint="folded"'
        raise ValueError(
            f"`{argument}` does not work with sharded parameters, whose plain weights no rank has: pass "
            '`checkpoint="parametrized"` and `fold_on_fit_end=False`; in a process of its own, the whole '
            "checkpoint can be loaded and folded (`apply_weight_norm`, `load_state_dict`, "
            "`fold_weight_norm`)."
        )
    for name, part in module.named_modules():
        if isinstance(part, MeanOnlyBatchNorm) and not part.synchronize:
            raise ValueError(
                f"{name!r} would keep other running means on each rank, and a checkpoint of a sharded model holds "
                "those of one: pass `synchronize=True` to `add_mean_only_batch_norm`."
            )
    if init == "data":
        raise ValueError(
            '`init="data"` does not work with sharded parameters, of which a forward pass has only copies: pass '
            '`init="keep"`, and in `configure_model`, before `fully_shard`, run a batch through the model inside '
            "`DataDependentInitialization`."
        )


def refuse_copied_model(trainer: pl.Trainer, own: Callback) -> None:
    """Raise if a callback before ours has copied the model already."""
    for callback in takewhile(lambda other: other is not own, callbacks_of(trainer)):
        if _is_lightnings(callback, _COPIES_MODEL):
            raise ValueError(
                f"{type(callback).__name__} is listed before {type(own).__name__} and has copied "
                f"the plain model already, so that its averages would be of other parameters: list "
                f"{type(own).__name__} first."
            )


def refuse_averages_without_means(trainer: pl.Trainer) -> None:
    """Raise if weights are averaged and running means are not."""
    for callback in callbacks_of(trainer):
        if _is_lightnings(callback, ("StochasticWeightAveraging",)):
            raise ValueError(
                f"`mean_only_batch_norm=True` does not work with {type(callback).__name__}, which averages weights "
                "and leaves running means those of the last weights: use `WeightAveraging`, which averages both."
            )


def refuse_two_forms(trainer: pl.Trainer, own: Callback, checkpoint: str) -> None:
    """Raise if another callback of this kind wants the model saved in another form."""
    others = [other for other in callbacks_of(trainer) if isinstance(other, type(own))]
    if any(getattr(other, "checkpoint", checkpoint) != checkpoint for other in others):
        raise ValueError(
            f'Two callbacks ask for `checkpoint="folded"` and `checkpoint="parametrized"`, but {type(own).__name__} '
            "saves the whole model in one form: give all of them the same."
        )
