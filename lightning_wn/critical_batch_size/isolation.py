"""What keeps branches apart from each other, and from everything around them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ProgressBar,
)
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_wn.callbacks.adaptive_batch_size.callback import AdaptiveBatchSizeCallback
from lightning_wn.trainer import copy_without_trainer

_OUT_OF_PLACE: dict[type[Callback], str] = {
    AdaptiveBatchSizeCallback: "a branch has one batch size",
    GradientAccumulationScheduler: "a branch has one batch size",
    BatchSizeFinder: "a branch has one batch size",
    LearningRateFinder: "the learning rate goes with the batch size; `tune_learning_rate=2.0` looks for it",
    EarlyStopping: "all branches are as long as `num_examples` or `target_loss` says",
    Checkpoint: "branches keep no checkpoints",
    ProgressBar: "the measurement has bars of its own; `progress_bar=False` turns them off",
}


def require_callbacks_in_place(callbacks: Sequence[Callback], source: str) -> None:
    """Raise ValueError for a callback that would change a branch's batch size, learning rate, length or traces.

    Args:
        callbacks: The callbacks.
        source: Where they come from.
    """
    for callback in callbacks:
        for kind, reason in _OUT_OF_PLACE.items():
            if isinstance(callback, kind):
                raise ValueError(f"{source} must leave out {type(callback).__name__}: {reason}.")


def own_copy(value: Any, argument: str) -> Any:
    """Copy the model or the data for a branch.

    Raises:
        ValueError: If it cannot be copied, such as a generator, or a model that keeps the loss of a step.
    """
    try:
        return copy_without_trainer(value)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"`{argument}` cannot be copied for each branch, got {type(value).__name__}: {error}. Pass a function that "
            "makes it."
        ) from error


def copy_each(value: Any) -> Any:
    """Copy what a Trainer is given; of a list, each element."""
    return [copy_without_trainer(x) for x in value] if isinstance(value, list) else copy_without_trainer(value)


@contextmanager
def own_random_state() -> Iterator[None]:
    """Leave the global random states and seeds as they were, also after an error."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ.get(name) for name in names}
    error: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as caught:  # `isolate_rng` restores nothing where an error passes through
            error = caught
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if error is not None:
        raise error


@contextmanager
def only_warnings_are_told() -> Iterator[None]:
    """Keep Lightning from telling of each of many Trainers; warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_wn")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def expected_warnings_left_out() -> Iterator[None]:
    """Leave out warnings on what is meant to be so in a branch; the others are shown once for all branches."""
    with warnings.catch_warnings():
        for beginning in (
            "You defined a `validation_step` but have no `val_dataloader`",
            "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
            "The number of training batches .* is smaller than the logging interval",
        ):
            warnings.filterwarnings("ignore", beginning)
        yield
