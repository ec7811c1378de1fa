"""Put other rows in the place of the others: what an example gets must stay as it was.

Needs first derivatives only. Sees whatever one example's part of the forward or backward pass depends on of the others,
if other values change it: batch statistics, detached ones too, message passing, contrastive losses, balancing losses,
selections within the batch. Does not see what no other values change: a loss that is linear in the last layer's
rows, each weighted by its place in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_wn.per_example.mixing.batches import turned, with_other_features
from lightning_wn.per_example.mixing.passes import Observation, Rows, Subject, observe
from lightning_wn.per_example.mixing.report import CannotLookError, Find
from lightning_wn.per_example.mixing.rows import Swap

# an example's rows come out of the same kernels at the same shapes: bit-equal, but for what adds atomically
_TOLERANCE = {torch.float64: 1e-9}
_OTHER_TOLERANCE = 1e-5
_TIMES_REPEAT = 20.0
# as they are, to near thresholds, and to far ones
_STRETCHES = (1.0, 30.0, 3000.0)


@dataclass(frozen=True)
class Reference:
    """What the tests compare with.

    Attributes:
        plain: The pass as it is, with the rows of ``watched``.
        watched: The rows that some swap keeps, by index.
        swaps: What is exchanged: rows as they are, and stretched.
        noise: How far two equal passes lie apart, relative.
        shared: Calls of layers whose results do not depend on the batch.
    """

    plain: Observation
    watched: Tensor
    swaps: tuple[Swap, ...]
    noise: float
    shared: set[tuple[str, int]]


def take_reference(subject: Subject, generator: torch.Generator) -> Reference:
    """Run the plain pass twice, and once with every example given the data of another.

    Raises:
        CannotLookError: If there is nothing to compare.
    """
    swaps = tuple(Swap.draw(subject.batch_size, generator, stretch=stretch) for stretch in _STRETCHES)
    watched = torch.unique(torch.cat([swap.kept for swap in swaps]))
    plain = observe(subject, watched)
    if not plain.finite:
        raise CannotLookError("the loss of the batch is not finite")
    shared: set[tuple[str, int]] = set()
    try:
        shared = _unmoved(plain, observe(subject, watched, batch=turned(subject.batch, subject.batch_size)), subject)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the user's code may say no to such a batch: then all that looks like rows is taken for rows
        shared = set()
    again = observe(subject, watched, shared=shared)
    plain = plain.without(shared)
    if not plain.grads:
        raise CannotLookError(f"no layer gives a tensor with {subject.batch_size} rows, one an example")
    noise = max((_worst(a, b)[0] for a, b in _pairs(plain, again)), default=0.0)
    if not noise < 1e-2:
        raise CannotLookError("two passes over the same batch with the same random state differ")
    return Reference(plain, watched, swaps, noise, shared)


def swap_activations(subject: Subject, reference: Reference) -> Find | None:
    """Exchange the other rows of what every layer gives, as they are and, with other rows kept, stretched.

    Raises:
        CannotLookError: If the model cannot do with the rows of other examples as they are; or whatever it says then.
    """
    plain, *stretches = reference.swaps
    other = observe(subject, reference.watched, shared=reference.shared, swap=plain)
    if not other.finite:
        raise CannotLookError("the loss is not finite with the rows of other examples")
    found = _compare(subject, reference, plain, other)
    for swap in stretches:
        if found is not None:
            return found
        try:
            other = observe(subject, reference.watched, shared=reference.shared, swap=swap)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # values that the model does not allow
            continue
        found = _compare(subject, reference, swap, other) if other.finite else None
    return found


def swap_features(subject: Subject, reference: Reference, require_parts: Callable[[], None]) -> Find | None:
    """Exchange the other examples' features in the batch: sees what mixes before the first layer.

    A loss may be divided by what the examples count, so all its gradients may have one factor in common.

    Args:
        subject: What is looked at.
        reference: What to compare with.
        require_parts: Raises where the batch cannot be cut, so that not all that looks like data is data.
    """
    require_parts()
    swap = reference.swaps[0]
    batch = with_other_features(subject.batch, subject.batch_size, swap)
    other = observe(subject, reference.watched, shared=reference.shared, batch=batch)
    return _compare(subject, reference, swap, other, scaled=True) if other.finite else None


def _compare(
    subject: Subject, reference: Reference, swap: Swap, other: Observation, *, scaled: bool = False
) -> Find | None:
    """Return where a kept example's share changed: in the forward pass the first place, in the backward the last."""
    kept = torch.isin(reference.watched, swap.kept).nonzero()[:, 0]
    plain, other = reference.plain.some(kept), other.some(kept)
    counting = {name for name, _, _ in plain.grads}
    for ours, theirs, what in (
        (plain.inputs, other.inputs, "what goes into"),
        (plain.outputs, other.outputs, "what comes out of"),
    ):
        for key, rows in ours.items():
            if key[0] in counting and key in theirs and _differ(rows, theirs[key], reference.noise):
                return Find(subject.label(key[0]), f"for one example, {what}")
    factor = _common_factor(plain.grads, other.grads) if scaled else 1.0
    last: Find | None = None
    for key in plain.outputs:
        if key not in plain.grads or key not in other.outputs:
            continue
        own = plain.grads[key]
        if _differ(own, other.grads.get(key, torch.zeros_like(own)) / factor, reference.noise):
            last = Find(subject.label(key[0]), "the gradient of one example by what comes out of")
    return last


def _differ(rows: Tensor, others: Tensor, noise: float) -> bool:
    if rows.shape != others.shape:
        return True
    tolerance = max(_TOLERANCE.get(rows.dtype, _OTHER_TOLERANCE), _TIMES_REPEAT * noise)
    return not _worst({("", 0, 0): rows}, {("", 0, 0): others})[0] <= tolerance


def _worst(ours: Rows, theirs: Rows) -> tuple[float, str]:
    """Return the largest relative difference of a row, and the module."""
    worst = 0.0, ""
    for key, rows in ours.items():
        others = theirs.get(key)
        if others is None or others.shape != rows.shape:
            continue
        a, b = (_flat(t) for t in (rows, others))
        sizes = a.norm(dim=1)
        # what is not finite to begin with says nothing
        usable = torch.isfinite(sizes)
        if not bool(usable.any()):
            continue
        # a row that is zero but for rounding is judged by the others
        floor = 1e-3 * sizes[usable].max() + torch.finfo(a.dtype).tiny
        ratio = float(((a - b).norm(dim=1)[usable] / (sizes[usable] + floor)).nan_to_num(nan=torch.inf).max())
        worst = max(worst, (ratio, key[0]))
    return worst


def _pairs(one: Observation, other: Observation) -> list[tuple[Rows, Rows]]:
    return [(one.inputs, other.inputs), (one.outputs, other.outputs), (one.grads, other.grads)]


def _common_factor(ours: Rows, theirs: Rows) -> float:
    """Return the factor that fits all gradients best."""
    product = square = 0.0
    for key, rows in ours.items():
        if key in theirs and theirs[key].shape == rows.shape:
            a, b = _flat(rows), _flat(theirs[key])
            product, square = product + float((a * b).sum()), square + float((a * a).sum())
    return product / square if product > 0.0 else 1.0


def _flat(rows: Tensor) -> Tensor:
    wide = torch.view_as_real(rows) if rows.is_complex() else rows
    return wide.reshape(len(rows), -1).double()


def _unmoved(plain: Observation, turned: Observation, subject: Subject) -> set[tuple[str, int]]:
    """Name the calls of layers that give the same for another batch: what all examples share."""
    return {
        key[:2]
        for key, rows in plain.outputs.items()
        if key[0] not in subject.dims and key in turned.outputs and torch.equal(rows, turned.outputs[key])
    }
