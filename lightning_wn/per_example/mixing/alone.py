"""Run one example alone: what goes into its layers must be what went into them in the batch.

On copies with dropout off, for batches that can be cut. A loss with weights normalises an example alone in another way,
so of gradients only this counts: an example that has one alone has one in the batch, and the reverse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_wn.per_example.mixing.batches import sliced
from lightning_wn.per_example.mixing.copies import turn_dropout_off
from lightning_wn.per_example.mixing.finite_swap import Reference
from lightning_wn.per_example.mixing.passes import Observation, Rows, Subject, observe
from lightning_wn.per_example.mixing.report import CannotLookError, Find

# kernels add in another order at another shape
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_OTHER_TOLERANCE = 5e-2
_EXAMPLES = 3


def require_cuttable(subject: Subject) -> None:
    """Run the batch without its last example.

    A table that has as many rows as there are examples is none of their data, and does not fit then.

    Raises:
        CannotLookError: If no example can be taken away; or whatever the model says then.
    """
    rest = subject.batch_size - 1
    if rest < 2:
        raise CannotLookError("the batch is too small to take an example away")
    batch = sliced(subject.batch, subject.batch_size, slice(0, rest))
    observe(subject, torch.tensor([0]), batch=batch, batch_size=rest)


def run_alone(subject: Subject, reference: Reference, require_parts: Callable[[], None]) -> Find | None:
    """Compare some examples alone with themselves in the batch.

    Args:
        subject: What is looked at.
        reference: What to compare with.
        require_parts: Raises where the batch cannot be cut.

    Raises:
        CannotLookError: If an example cannot be run alone.
    """
    require_parts()
    kept = reference.swaps[0].kept[:_EXAMPLES]
    together = observe(subject, kept, shared=reference.shared, prepare=turn_dropout_off)
    other = observe(subject, kept, shared=reference.shared, prepare=turn_dropout_off, other_numbers=True)
    if any(not torch.equal(rows, other.inputs[key]) for key, rows in together.inputs.items() if key in other.inputs):
        raise CannotLookError("the model draws random numbers outside of dropout layers")
    for place, index in enumerate(kept.tolist()):
        batch = sliced(subject.batch, subject.batch_size, slice(index, index + 1))
        alone = observe(subject, torch.tensor([0]), batch=batch, batch_size=1, prepare=turn_dropout_off)
        found = _compare(subject, together.some(torch.tensor([place])), alone)
        if found is not None:
            return found
    return None


def _compare(subject: Subject, together: Observation, alone: Observation) -> Find | None:
    counting = {name for name, _, _ in together.grads}
    for key, rows in together.inputs.items():
        own = alone.inputs.get(key)
        if key[0] not in counting or own is None or own.shape != rows.shape:
            continue
        size, difference = float(rows.abs().max()), float((rows - own).abs().max())
        if difference > _TOLERANCE.get(rows.dtype, _OTHER_TOLERANCE) * size:
            return Find(subject.label(key[0]), "for one example, what goes into")
    if alone.finite and _is_zero(together.grads) != _is_zero(alone.grads):
        last = next(reversed(together.outputs))
        return Find(subject.label(last[0]), "whether one example has a gradient at all at")
    return None


def _is_zero(grads: Rows) -> bool:
    return not any(bool(rows.any()) for rows in grads.values())
