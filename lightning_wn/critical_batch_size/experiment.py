"""What is asked of a measurement: which branches to train, and what they are judged by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_wn.arguments import check_confidence, is_between, is_whole
from lightning_wn.batch_size.learning_rate import learning_rate_factor
from lightning_wn.critical_batch_size.branch import BranchPlan
from lightning_wn.critical_batch_size.result import Method

PowerRule = Literal["sqrt", "linear", "none"]


def plain(value: Any) -> Any:
    """Return numpy's whole numbers as Python's, which JSON can hold, and anything else as it is."""
    return int(value) if is_whole(value, 0) else value


@dataclass(frozen=True, kw_only=True)
class Target:
    """What branches are judged by: the loss after equally many examples, or the steps to a loss.

    Attributes:
        method: ``"branches"`` or ``"target_loss"``.
        loss: What is to be reached; None for ``"branches"``.
        tolerance: How much more loss counts as none.
        monitor: A metric of validation in place of the training loss.
        confidence: Level of the intervals.
        unit: The name of what is counted.
    """

    method: Method = "branches"
    loss: float | None = None
    tolerance: float = 0.01
    monitor: str | None = None
    confidence: float = 0.95
    unit: str = "examples"

    def __post_init__(self) -> None:
        """Check that the numbers are in range and go together."""
        if self.method not in get_args(Method):
            raise ValueError(f"`method` must be one of {list(get_args(Method))}, got {self.method!r}.")
        if (self.loss is not None) != (self.method == "target_loss"):
            raise ValueError(
                f"`target_loss` goes with `method='target_loss'` and is needed there, got {self.loss!r} with "
                f"{self.method!r}."
            )
        if not math.isfinite(self.loss or 0.0):
            raise ValueError(
                f"`target_loss` must be a number, got {self.loss!r}; take one that the model is known to reach."
            )
        if not is_between(self.tolerance, 0.0):
            raise ValueError(f"`tolerance` must be a positive number, got {self.tolerance!r}; 0.01 is usual for nats.")
        if self.monitor == "":
            raise ValueError("`monitor` must be the name of a logged metric, or None for the training loss, got ''.")
        check_confidence(self.confidence)

    @property
    def fewest_sizes(self) -> int:
        """How many batch sizes it takes."""
        return 2 if self.loss is None else 3


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Which branches there are: batch sizes, their learning rates, seeds.

    Attributes:
        batch_sizes: Examples in an optimizer step, over all ranks, the smallest first.
        num_examples: Most examples of a branch.
        seeds: Each batch size is trained once with each.
        learning_rate: How the learning rate goes with the batch size.
        base_batch_size: The batch size that the model's own learning rate is for; None is the smallest.
        tune_learning_rate: The ratio of two learning rates that are tried; None for no tuning.
        fewest_sizes: How many batch sizes there must be.
    """

    batch_sizes: tuple[int, ...]
    num_examples: int
    seeds: tuple[int, ...] = (0,)
    learning_rate: PowerRule = "sqrt"
    base_batch_size: int | None = None
    tune_learning_rate: float | None = None
    fewest_sizes: int = 2

    def __post_init__(self) -> None:
        """Check that the numbers are in range and go together."""
        sizes, seeds = list(self.batch_sizes), list(self.seeds)
        if not all(map(is_whole, sizes)):
            raise ValueError(f"`batch_sizes` must be whole numbers from 1 on, got {sizes}; for instance [8, 16, 32].")
        if len(sizes) < self.fewest_sizes:
            raise ValueError(f"`batch_sizes` must hold {self.fewest_sizes} different sizes or more, got {sizes}.")
        if not sizes[-1] <= self.num_examples < math.inf:
            raise ValueError(
                f"`num_examples` must be the largest batch size, {sizes[-1]}, or more, got {self.num_examples}; a "
                "branch should take many steps of it, and come to an end."
            )
        if not seeds:
            raise ValueError("`seeds` must hold one number or more, got none; (0,) trains each batch size once.")
        if not all(is_whole(seed, 0) and seed < 2**32 for seed in seeds):
            raise ValueError(f"`seeds` must be whole numbers from 0 to 2**32 - 1, got {seeds}.")
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"`seeds` must differ, got {seeds}: the same run twice tells nothing new.")
        if self.learning_rate not in get_args(PowerRule):
            raise ValueError(f"`learning_rate` must be one of {list(get_args(PowerRule))}, got {self.learning_rate!r}.")
        if self.base_batch_size is not None and not is_between(self.base_batch_size, 0.0):
            raise ValueError(
                f"`base_batch_size` must be a positive number, got {self.base_batch_size!r}; it is the batch size that "
                "the model's learning rate is for."
            )
        if self.tune_learning_rate is not None and not is_between(self.tune_learning_rate, 1.0):
            raise ValueError(
                f"`tune_learning_rate` must be a ratio above 1, or None for no tuning, got {self.tune_learning_rate!r};"
                " 2.0 tries learning rates a factor of 2 apart."
            )

    @classmethod
    def of(cls, batch_sizes: Iterable[int], seeds: Iterable[int], **others: Any) -> Sweep:
        """Return a sweep over what a user gives, in order, without repetition, in Python's own numbers."""
        sizes = tuple(sorted({plain(size) for size in batch_sizes}))
        return cls(batch_sizes=sizes, seeds=tuple(map(plain, seeds)), **{k: plain(v) for k, v in others.items()})

    @property
    def base(self) -> int:
        """The batch size that the model's own learning rate and scheduler are for."""
        return self.batch_sizes[0] if self.base_batch_size is None else self.base_batch_size

    def rule_factor(self, size: int) -> float:
        """Return what the rule multiplies the learning rate with at a batch size."""
        return learning_rate_factor(self.learning_rate, self.base, size, math.nan)

    def plans(self, size: int, exponent: int) -> list[BranchPlan]:
        """Return a size's branches, one for each seed, at this power of the ratio on top of the rule's factor."""
        factor = (self.tune_learning_rate or 1.0) ** exponent
        return [BranchPlan(batch_size=size, learning_rate_factor=factor, seed=seed) for seed in self.seeds]


def window_shape(size: int, micro_batch: int | None, ranks: int, max_micro_batch: int | None) -> tuple[int, int]:
    """Return the examples in a micro-batch of a rank and the micro-batches in an optimizer step.

    Args:
        size: Examples in an optimizer step, over all ranks.
        micro_batch: Examples in a batch of the data; None where it is made to order.
        ranks: How many there are.
        max_micro_batch: Most examples that a rank has room for.
    """
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
