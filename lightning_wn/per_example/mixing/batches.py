"""Batches with other rows, or fewer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_wn.per_example.mixing.report import CannotLookError
from lightning_wn.per_example.mixing.rows import Swap


def clone_batch(batch: Any) -> Any:
    """Copy a batch, so that a training step that changes its batch changes none but its own."""
    return _change(batch, lambda leaf: leaf.clone())


def turned(batch: Any, batch_size: int) -> Any:
    """Give every example the data of the one before it.

    Raises:
        CannotLookError: If no tensor has a row an example.
    """
    return _change_rows(batch, batch_size, lambda leaf: leaf.roll(1, 0))


def sliced(batch: Any, batch_size: int, rows: slice) -> Any:
    """Take some of the examples.

    Raises:
        CannotLookError: If no tensor has a row an example.
    """
    return _change_rows(batch, batch_size, lambda leaf: leaf[rows].clone())


def with_other_features(batch: Any, batch_size: int, swap: Swap) -> Any:
    """Exchange the features of the other examples, and leave what a loss may count: labels, masks, missing values.

    Raises:
        CannotLookError: If the batch holds no floating-point features.
    """
    changed = 0

    def change(leaf: Tensor) -> Tensor:
        nonlocal changed
        if not leaf.is_floating_point() or not bool(torch.isfinite(leaf).all() & ((leaf != 0) & (leaf != 1)).any()):
            return leaf.clone()
        changed += 1
        return swap.apply(leaf, 0)

    result = _change_rows(batch, batch_size, change)
    if not changed:
        raise CannotLookError("the batch holds no floating-point features")
    return result


def _change_rows(batch: Any, batch_size: int, change: Callable[[Tensor], Tensor]) -> Any:
    found = 0

    def of_leaf(leaf: Tensor) -> Tensor:
        nonlocal found
        if leaf.layout != torch.strided or leaf.is_nested or leaf.ndim == 0 or leaf.shape[0] != batch_size:
            return leaf.clone()
        found += 1
        return change(leaf)

    result = _change(batch, of_leaf)
    if not found:
        raise CannotLookError("no tensor of the batch is known to have one row an example")
    return result


def _change(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            changed = change(leaf.detach())
            return changed.requires_grad_(leaf.requires_grad) if leaf.is_floating_point() else changed
        # a graph, or another object of the user's
        return copy.deepcopy(leaf)

    return pytree.tree_map(of_leaf, batch, is_leaf=lambda node: isinstance(node, PackedSequence))
