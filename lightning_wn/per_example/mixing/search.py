"""All tests for mixing together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from typing import Any, get_args

import torch
from torch import nn

from lightning_wn.per_example.engine.layers import BatchDim
from lightning_wn.per_example.mixing.alone import require_cuttable, run_alone
from lightning_wn.per_example.mixing.copies import RandomState, hooked_by_user
from lightning_wn.per_example.mixing.finite_swap import swap_activations, swap_features, take_reference
from lightning_wn.per_example.mixing.passes import Subject
from lightning_wn.per_example.mixing.report import CannotLookError, Find, Mixing, MixingReport, MixingTest
from lightning_wn.per_example.mixing.second_derivative import differentiate_twice, first_line
from lightning_wn.text import some

_SWAP: MixingTest = "finite swap"


def find_mixing(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Any],
    batch: Any,
    batch_size: int,
    *,
    batch_dims: Mapping[str, BatchDim | None] | None = None,
    copier: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    seed: int = 0,
    tests: Collection[MixingTest] = get_args(MixingTest),
) -> MixingReport:
    """Look whether a batch row's share of the gradient depends on other rows, so that it is no example's gradient.

    Sums cannot tell: where examples mix, the rows still add up to the gradient of the loss. Three tests look at layers
    that have parameters, each with blind spots of its own: :mod:`~.finite_swap`, :mod:`~.second_derivative` and
    :mod:`~.alone`. A denominator that the batch has in common, as the number of tokens or the sum of class weights, is
    no mixing. None of them sees examples that share data (mixup) or a batch that lies in another dimension than is
    said, if the model treats both alike.

    Nothing of the model changes, nor the batch or the random state; hooks that are not part of the model's computation
    are not called. Takes about 23 passes, on one copy at a time.

    Args:
        model: The model, in the mode in which it is trained.
        loss_fn: Computes the mean loss from a copy of the model and the batch, a scalar.
        batch: What it takes; tensors, and dicts, lists and tuples of them, can be exchanged by row, others not.
        batch_size: B.
        batch_dims: By module, the dimension in which the examples lie, ``"folded"`` for B·k parts in the first one,
            None for what all examples share. By default the first, where what comes out depends on the batch at all.
        copier: Copies the model.
        seed: Chooses rows and projections.
        tests: Which to make; all by default.

    Returns:
        The outcome; what goes wrong in the model's own code is a reason why a test was not made, never an error.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> find_mixing(model, lambda net, x: net(x).square().mean(), batch, 8).outcome.value
        'separate'
        >>> report = find_mixing(model, lambda net, x: net(x).std(0).sum(), batch, 8)
        >>> report.outcome.value, report.test
        ('mixes', 'finite swap')
    """
    if batch_size < 2:
        return MixingReport(outcome=Mixing.SEPARATE)
    subject = Subject(model, loss_fn, batch, batch_size, dict(batch_dims or {}), copier, RandomState())
    generator = torch.Generator().manual_seed(seed)
    skipped: dict[str, str] = {}
    try:
        reference = take_reference(subject, generator)
        found = swap_activations(subject, reference) if _SWAP in tests else None
    except Exception as error:
        return MixingReport(outcome=Mixing.UNKNOWN, why=_reason(error), skipped={_SWAP: _reason(error)})
    if found is not None:
        return _found(_SWAP, found)
    cut = cache(partial(require_cuttable, subject))
    others: list[tuple[MixingTest, Callable[[], Find | None]]] = [
        ("second derivative", partial(differentiate_twice, subject, reference, generator)),
        (_SWAP, lambda: swap_features(subject, reference, cut)),
        ("alone", lambda: run_alone(subject, reference, cut)),
    ]
    for name, test in others:
        try:
            found = test() if name in tests else None
        except Exception as error:
            skipped[name if name != _SWAP else "swap of features"] = _reason(error)
            continue
        if found is not None:
            return _found(name, found)
    if hooked := hooked_by_user(model):
        return MixingReport(
            outcome=Mixing.UNKNOWN,
            why=f"forward hooks on {some(map(repr, hooked))} may change what the model computes, and are called in "
            "training only",
            skipped=skipped,
        )
    return MixingReport(outcome=Mixing.SEPARATE, skipped=skipped)


def _found(test: MixingTest, find: Find) -> MixingReport:
    return MixingReport(outcome=Mixing.MIXES, test=test, where=find.where, why=find.sentence)


def _reason(error: Exception) -> str:
    """Say why a test was not made."""
    if isinstance(error, CannotLookError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "there is not enough memory for another pass"
    return f"the model failed on a copy of itself ({type(error).__name__}: {first_line(error)})"
