"""Callbacks that have no place in a branch."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ProgressBar,
)

from lightning_wn.batch_size.adaptive import AdaptiveBatchSizeCallback

_OUT_OF_PLACE: dict[type[Callback], str] = {
    AdaptiveBatchSizeCallback: "a branch has one batch size",
    GradientAccumulationScheduler: "a branch has one batch size",
    BatchSizeFinder: "a branch has one batch size",
    LearningRateFinder: "the learning rate goes with the batch size; `tune_learning_rate=2.0` looks for it",
    EarlyStopping: "all branches are as long as `num_examples` or `target_loss` says",
    Checkpoint: "branches keep no checkpoints",
    ProgressBar: "the measurement has bars of its own; `progress_bar=False` turns them off",
}


def check_callbacks(callbacks: Sequence[Callback], source: str) -> None:
    """Raise ValueError for a callback that would change a branch's batch size, learning rate, length or traces.

    Args:
        callbacks: The callbacks.
        source: Where they come from.
    """
    for callback in callbacks:
        for kind, reason in _OUT_OF_PLACE.items():
            if isinstance(callback, kind):
                raise ValueError(f"{source} must leave out {type(callback).__name__}: {reason}.")
