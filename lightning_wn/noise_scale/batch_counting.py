"""How many examples a micro-batch holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, is_dataclass
from functools import singledispatch
from numbers import Real
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

# returns int, float or Tensor; named so, jsonargparse would only take functions annotated with that union
BatchSizeFn = Callable[[Any], Any]

_COUNTS = ("num_graphs", "batch_size")
"""Where batches that are objects of their own say how many examples they hold (PyTorch Geometric, DGL)."""


@dataclass(frozen=True)
class BatchCount:
    """What a micro-batch's loss is a mean over.

    Attributes:
        total: Number of examples (or tokens) in all; a tensor stays on its device.
        by_example: The same for each example of the batch, shape (B,), where the user told it.
    """

    total: float | Tensor
    by_example: Tensor | None = None


def count_examples(batch: Any, batch_size_fn: BatchSizeFn | None) -> BatchCount:
    """Return the number of examples (or tokens) over which the loss of this micro-batch is a mean.

    Args:
        batch: The batch as ``training_step`` gets it.
        batch_size_fn: Counts what the user wants counted: a number, or one for each example, such as the unmasked
            tokens ``lambda batch: batch["mask"].sum(1)``, shape (B,). A tensor stays on its device. By default the
            first dimension of the batch's tensors, or the number of graphs in it, on which all must agree.

    Raises:
        ValueError: If the count cannot be inferred or is negative.
    """
    if batch_size_fn is not None:
        count = batch_size_fn(batch)
        # the value of a count on the device is not read here: that would wait for the device
        if isinstance(count, Tensor) and count.ndim == 1 and count.numel():
            return BatchCount(count.detach().sum(), count.detach())
        if isinstance(count, Tensor) and count.numel() == 1:
            return BatchCount(count.detach().reshape(()))
        if not isinstance(count, Real) or not 0 <= float(count) < math.inf:
            raise ValueError(
                "`batch_size_fn` must return the number of examples (or tokens) of a batch, or a tensor with "
                f"one for each example, got {count!r}; return what the loss is a mean over."
            )
        return BatchCount(float(count))
    sizes = _sizes(batch)
    if len(sizes) == 1:
        return BatchCount(sizes.pop())
    entries = " and ".join(map(str, sorted(sizes)))
    found = f"it holds parts of {entries} entries" if sizes else "nothing in it that is known here tells its length"
    raise ValueError(
        f"The number of examples in a batch of type {type(batch).__name__} cannot be inferred: {found}; pass "
        "`batch_size_fn`, a function from a batch to the number of examples its loss is a mean over, such as "
        "`lambda batch: len(batch['label'])`."
    )


@singledispatch
def _sizes(batch: Any) -> set[int]:
    """Return what the parts of a batch say of its size: one number, if they agree."""
    # batches of graphs and the like hold tensors over nodes, edges and graphs, and say how many graphs there are
    for name in _COUNTS:
        count = getattr(batch, name, None)
        if isinstance(count, int):
            targets = getattr(batch, "y", None)
            return {count} | (_sizes(targets) if isinstance(targets, Tensor) else set())
    if is_dataclass(batch) and not isinstance(batch, type):
        if isinstance(batch, Sized):
            return {len(batch)}
        return _union(getattr(batch, field.name) for field in fields(batch))
    return set()


@_sizes.register
def _(batch: Tensor) -> set[int]:
    return {batch.shape[0]} if batch.ndim else set()


@_sizes.register
def _(batch: PackedSequence) -> set[int]:
    return {int(batch.batch_sizes[0])}


@_sizes.register(str)
@_sizes.register(bytes)
def _(batch: str | bytes) -> set[int]:
    return set()


@_sizes.register
def _(batch: Mapping) -> set[int]:  # type: ignore[type-arg]  # singledispatch takes bare classes
    return _union(batch.values())


@_sizes.register
def _(batch: Sequence) -> set[int]:  # type: ignore[type-arg]  # as above
    sizes = _union(batch)
    # one record an example, such as an image's boxes; where the records agree they may be batches themselves
    records = len(sizes) > 1 and all(isinstance(part, Mapping) for part in batch)
    return {len(batch)} if records else sizes


def _union(parts: Iterable[Any]) -> set[int]:
    return set().union(*map(_sizes, parts))
