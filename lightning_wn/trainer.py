"""What is read of a Trainer, and how numbers are handed to its loggers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

Batches: TypeAlias = Iterable[Any] | LightningDataModule
"""Where batches come from: a loader or whatever else gives them, or a DataModule's training loader."""

_Copied = TypeVar("_Copied")

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


def log_metrics(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Hand numbers to ``trainer.callback_metrics`` and to all loggers, beside :func:`step_to_log`'s step."""
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


def largest_accumulation(trainer: Trainer) -> int:
    """Return the most micro-batches per optimizer step that the run is known to reach."""
    factors = [trainer.accumulate_grad_batches]
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            factors += callback.scheduling.values()
    return max(factors)


def epoch_has_same_examples(trainer: Trainer, num_batches: int) -> bool:
    """Whether every epoch has the same examples in the same so many batches or fewer, as far as can be told."""
    if trainer.num_training_batches > num_batches:
        return False
    loader = trainer.train_dataloader
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        return False
    # a limit leaves out others of a shuffled loader each time; Lightning does not shuffle what it overfits
    everything = isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches == 1.0
    return bool(trainer.overfit_batches) or everything  # type: ignore[attr-defined]  # set outside Trainer.__init__


def has_training_step(model: nn.Module) -> bool:
    """Whether a model is a LightningModule, which tells its own loss."""
    return isinstance(model, LightningModule)


def training_step_output(model: nn.Module, batch: Any, batch_idx: int) -> Any:
    """Return what ``training_step`` gives; its ``batch_idx`` is optional, as it is for the Trainer."""
    step: Any = model.training_step
    return step(batch, batch_idx) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)


def require_lightning_trainer(trainer: object, callback_name: str) -> None:
    """Raise if the Trainer is ``pytorch_lightning``'s, whose classes are not ``lightning.pytorch``'s.

    The two packages hold the same code under two names, so a callback of one runs in a Trainer of the
    other and every ``isinstance`` in it silently says no.

    Args:
        trainer: The Trainer that calls the callback.
        callback_name: The callback's name for the error.

    Raises:
        TypeError: If the Trainer's class comes from ``pytorch_lightning``.
    """
    if isinstance(trainer, pl.Trainer):
        return
    if any(cls.__module__.partition(".")[0] == "pytorch_lightning" for cls in type(trainer).__mro__):
        raise TypeError(
            f"{callback_name} is a `lightning.pytorch` callback and cannot work in a Trainer from the "
            "package `pytorch_lightning`, whose classes are different ones: write "
            "`import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`, for the Trainer "
            "and for the LightningModule."
        )


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Return the Trainer's callbacks, in the order in which their hooks run."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector


def training_batches(data: Batches) -> Iterable[Any]:
    """Return what gives the batches; a DataModule is set up for it."""
    if not isinstance(data, LightningDataModule):
        return data
    data.prepare_data()
    data.setup("fit")
    loader: Iterable[Any] = data.train_dataloader()
    return loader


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch on the device, as the Trainer moves it there."""
    return move_data_to_device(batch, device)


def copy_without_trainer(value: _Copied, memo: dict[int, Any] | None = None) -> _Copied:
    """Copy a model, a DataModule or a loader; data sets of loaders and Trainers are not copied.

    A compiled model's copy is not compiled: what was compiled belongs to the original, and computes with its weights.

    Args:
        value: What to copy.
        memo: As of `copy.deepcopy`: from the identity of what is found in it to what stands for that in the copy.
    """
    memo = {} if memo is None else memo
    # a LightningModule leaves its Trainer out by itself
    compiled = isinstance(value, LightningModule) and value._compiler_ctx is not None
    if compiled:
        memo[id(value._compiler_ctx)] = None  # type: ignore[attr-defined]  # it is a LightningModule
    if isinstance(value, LightningDataModule) and value.trainer is not None:
        memo[id(value.trainer)] = None
    if isinstance(value, DataLoader):
        memo[id(value.dataset)] = value.dataset
        if value._iterator is not None:  # workers that persist
            memo[id(value._iterator)] = None
    copied = copy.deepcopy(value, memo)
    if compiled:
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(copied).pop(name, None)
    return copied
