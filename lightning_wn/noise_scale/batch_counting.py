"""How many examples a micro-batch holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

from torch import Tensor

# returns int, float or Tensor; named so, jsonargparse would only take functions annotated with that union
BatchSizeFn = Callable[[Any], Any]


def count_examples(batch: Any, batch_size_fn: BatchSizeFn | None) -> float | Tensor:
    """Return the number of examples (or tokens) over which the loss of this micro-batch is a mean.

    Args:
        batch: The batch as ``training_step`` gets it.
        batch_size_fn: Counts what the user wants counted; a tensor stays on its device. By default the
            first dimension of the batch's tensors, on which all must agree.

    Raises:
        ValueError: If the count cannot be inferred or is not positive.

    Example:
        >>> import torch
        >>> count_examples({"x": torch.zeros(8, 3), "y": torch.zeros(8)}, None)
        8
    """
    if batch_size_fn is not None:
        count = batch_size_fn(batch)
        # the value of a count on the device is not read here: that would wait for the device
        if isinstance(count, Tensor) and count.numel() == 1:
            return count.detach().reshape(())
        if not isinstance(count, Real) or not 0 < float(count) < math.inf:
            raise ValueError(f"`batch_size_fn` must return the positive number of examples of a batch, got {count!r}.")
        return float(count)
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim}
    if len(sizes) == 1 and (size := sizes.pop()) > 0:
        return size
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
