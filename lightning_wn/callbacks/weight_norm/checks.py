"""What the callback cannot do with a Trainer, its strategy and its other callbacks, said before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.optim import Optimizer

from lightning_wn.text import some
from lightning_wn.trainer import callbacks_of
from lightning_wn.weight_norm.core.mean_only_batch_norm import MeanOnlyBatchNorm
from lightning_wn.weight_norm.core.normalized_module import g_and_v, is_sharded, normalized_weights, weight_norm_in
from lightning_wn.weight_norm.core.selection import NamedLayer

# callbacks of Lightning that copy the model in their own `setup`, and later pair parameters by position
_COPIES_MODEL = ("WeightAveraging", "StochasticWeightAveraging")


def _is_lightnings(callback: Callback, names: Sequence[str]) -> bool:
    """Tell whether this is a callback of Lightning that has one of these names, or comes of one."""
    bases = [cls for cls in type(callback).__mro__ if cls.__module__.startswith("lightning.")]
    return any(cls.__name__ in names for cls in bases)


def require_whole_parameters(trainer: pl.Trainer) -> None:
    """Raise under strategies whose parameters have no norms of units."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"Weight normalization does not work with {type(trainer.strategy).__name__}, which shards or "
            "flattens the parameters of which the norms are taken: use a single device or a DDP strategy."
        )


def require_form_for_shards(module: nn.Module, checkpoint: str, init: str, *, fold_on_fit_end: bool) -> None:
    """Raise if parameters are sharded and the callback's arguments ask for what they cannot give."""
    if not any(is_sharded(weight) for layer in module.modules() for weight in normalized_weights(layer).values()):
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


def require_no_earlier_copy(trainer: pl.Trainer, own: Callback) -> None:
    """Raise if a callback before ours has copied the model already."""
    for callback in takewhile(lambda other: other is not own, callbacks_of(trainer)):
        if _is_lightnings(callback, _COPIES_MODEL):
            raise ValueError(
                f"{type(callback).__name__} is listed before {type(own).__name__} and has copied "
                f"the plain model already, so that its averages would be of other parameters: list "
                f"{type(own).__name__} first."
            )


def require_averaged_means(trainer: pl.Trainer) -> None:
    """Raise if weights are averaged and running means are not."""
    for callback in callbacks_of(trainer):
        if _is_lightnings(callback, ("StochasticWeightAveraging",)):
            raise ValueError(
                f"`mean_only_batch_norm=True` does not work with {type(callback).__name__}, which averages weights "
                "and leaves running means those of the last weights: use `WeightAveraging`, which averages both."
            )


def require_one_form(trainer: pl.Trainer, own: Callback, checkpoint: str) -> None:
    """Raise if another callback of this kind wants the model saved in another form."""
    others = [other for other in callbacks_of(trainer) if isinstance(other, type(own))]
    if any(getattr(other, "checkpoint", checkpoint) != checkpoint for other in others):
        raise ValueError(
            f'Two callbacks ask for `checkpoint="folded"` and `checkpoint="parametrized"`, but {type(own).__name__} '
            "saves the whole model in one form: give all of them the same."
        )


def require_in_optimizers(optimizers: Iterable[Optimizer], layers: Iterable[NamedLayer]) -> None:
    """Raise unless optimizers and weight-normalized layers hold the same Parameters, both ways.

    No optimizer may hold a weight that g and v took the place of, and each trainable g and v must be in some
    optimizer. Parameters of an optimizer that belong to no module, such as a learned loss weight kept
    elsewhere, are legal and none of its business; so is a run in which no optimizer holds anything. Layers that this
    package does not normalize are passed over.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if not held:
        return
    stale, missing = [], []
    for layer in layers:
        for tensor, normalized in normalized_weights(layer.module).items():
            weight_norm = weight_norm_in(normalized)
            owner = str(layer) if tensor == "weight" else f"{tensor} of {layer}"
            replaced = weight_norm.replaced() if weight_norm.replaced is not None else None
            if replaced is not None and id(replaced) in held:
                stale.append(owner)
            missing += [
                f"{letter} of {owner}"
                for letter, parameter in zip("gv", g_and_v(normalized), strict=True)
                if parameter.requires_grad and id(parameter) not in held
            ]
    if stale:
        raise ValueError(
            f"An optimizer holds the plain weight of {some(stale)}, which weight normalization has "
            "replaced, so that the layer would not train: collect the parameters inside "
            "`configure_optimizers`, and not in `__init__`, where they are not yet g and v."
        )
    if missing:
        raise ValueError(
            f"No optimizer holds the trainable {some(missing)}: if parameters are grouped by name, let the "
            'group of "weight" also take names that contain "parametrizations.weight" (g is `original0`, v '
            "is `original1`); if the layer is left out on purpose, add it to `exclude` or set "
            "`requires_grad_(False)` on it."
        )
