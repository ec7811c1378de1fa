"""What the arguments of a measurement must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, get_args

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ProgressBar,
)

from lightning_wn.callbacks.adaptive_batch_size.callback import AdaptiveBatchSizeCallback
from lightning_wn.critical_batch_size.result import Method

PowerRule = Literal["sqrt", "linear", "none"]


def whole_number(value: Any) -> Any:
    """Return numpy's whole numbers as Python's, and anything else as it is."""
    return value if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def check_numbers(
    *,
    sizes: Sequence[int],
    method: str,
    num_examples: int,
    target_loss: float | None,
    tolerance: float,
    learning_rate: str,
    base_batch_size: int | None,
    tune_learning_rate: float | None,
    confidence: float,
) -> None:
    """Raise ValueError for numbers out of range, or that do not go together."""
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise ValueError(f"`batch_sizes` must be whole numbers from 1 on, got {list(sizes)}; for instance [8, 16, 32].")
    if len(sizes) < (needed := 2 if method == "branches" else 3):
        raise ValueError(f"`batch_sizes` must hold {needed} different sizes or more, got {list(sizes)}.")
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {list(get_args(Method))}, got {method!r}.")
    if learning_rate not in get_args(PowerRule):
        raise ValueError(f"`learning_rate` must be one of {list(get_args(PowerRule))}, got {learning_rate!r}.")
    if not sizes[-1] <= num_examples < math.inf:
        raise ValueError(
            f"`num_examples` must be the largest batch size, {sizes[-1]}, or more, got {num_examples}; a branch "
            "should take many steps of it, and come to an end."
        )
    if (target_loss is not None) != (method == "target_loss"):
        raise ValueError(
            f"`target_loss` goes with `method='target_loss'` and is needed there, got {target_loss!r} with {method!r}."
        )
    if not math.isfinite(target_loss or 0.0):
        raise ValueError(
            f"`target_loss` must be a number, got {target_loss!r}; take one that the model is known to reach."
        )
    if not 0 < tolerance < math.inf:
        raise ValueError(f"`tolerance` must be a positive number, got {tolerance!r}; 0.01 is usual for nats.")
    if base_batch_size is not None and not base_batch_size > 0:
        raise ValueError(
            f"`base_batch_size` must be a positive number, got {base_batch_size!r}; it is the batch size that the "
            "model's learning rate is for."
        )
    if tune_learning_rate is not None and not 1 < tune_learning_rate < math.inf:
        raise ValueError(
            f"`tune_learning_rate` must be a ratio above 1, or None for no tuning, got {tune_learning_rate!r}; 2.0 "
            "tries learning rates a factor of 2 apart."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence!r}; 0.95 is usual.")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError for seeds that are none, or not all different."""
    if not seeds:
        raise ValueError("`seeds` must hold one number or more, got none; (0,) trains each batch size once.")
    if any(not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"`seeds` must be whole numbers from 0 to 2**32 - 1, got {list(seeds)}.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must differ, got {list(seeds)}: the same run twice tells nothing new.")


def check_modes(monitor: str | None, max_micro_batch: int | None, data: Any) -> None:
    """Raise ValueError for what does not go with the data or the model."""
    if monitor == "":
        raise ValueError("`monitor` must be the name of a logged metric, or None for the training loss, got ''.")
    if max_micro_batch is not None and not max_micro_batch > 0:
        raise ValueError(f"`max_micro_batch` must be a positive number, or None for no limit, got {max_micro_batch!r}.")
    if max_micro_batch is not None and not callable(data):
        raise ValueError(
            "`max_micro_batch` is for `data` that is a function from a micro-batch size, got "
            f"{type(data).__name__}, whose batches are as large as they are; leave it out."
        )


def window_shape(size: int, micro_batch: int | None, ranks: int, max_micro_batch: int | None) -> tuple[int, int]:
    """Return the examples in a micro-batch of a rank and the micro-batches in an optimizer step."""
    if micro_batch is not None:
        if size % (micro_batch * ranks):
            raise ValueError(
                f"`batch_sizes` must be multiples of {micro_batch * ranks}, the micro-batch of {micro_batch} times "
                f"{ranks} {'rank' if ranks == 1 else 'ranks'}, got {size}; or make `data` a function from the "
                "micro-batch size to a DataLoader."
            )
        return micro_batch, size // (micro_batch * ranks)
    if size % ranks:
        raise ValueError(f"`batch_sizes` must be multiples of the {ranks} ranks, got {size}.")
    accumulate = math.ceil(size / ranks / (max_micro_batch or size))
    while size // ranks % accumulate:
        accumulate += 1
    return size // ranks // accumulate, accumulate


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
