"""How many examples a micro-batch holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import Any

from torch import Tensor

# returns int, float or Tensor; named so, jsonargparse would only take functions annotated with that union
BatchSizeFn = Callable[[Any], Any]


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
            first dimension of the batch's tensors, on which all must agree.

    Raises:
        ValueError: If the count cannot be inferred or is not positive.
    """
    if batch_size_fn is not None:
        count = batch_size_fn(batch)
        # the value of a count on the device is not read here: that would wait for the device
        if isinstance(count, Tensor) and count.ndim == 1 and count.numel():
            return BatchCount(count.detach().sum(), count.detach())
        if isinstance(count, Tensor) and count.numel() == 1:
            return BatchCount(count.detach().reshape(()))
        if not isinstance(count, Real) or not 0 < float(count) < math.inf:
            raise ValueError(
                "`batch_size_fn` must return the positive number of examples (or tokens) of a batch, or a tensor with "
                f"one for each example, got {count!r}; return what the loss is a mean over."
            )
        return BatchCount(float(count))
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim}
    if len(sizes) == 1 and (size := sizes.pop()) > 0:
        return BatchCount(size)
    found = f"tensors of first dimension {sorted(sizes)}" if sizes else "no tensor with a first dimension"
    raise ValueError(
        f"The number of examples in a batch of type {type(batch).__name__} cannot be inferred: it holds {found}; "
        "pass `batch_size_fn`, a function from a batch to the number of examples its loss is a mean over."
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for value in batch:
            yield from _tensors(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _tensors(getattr(batch, field.name))
