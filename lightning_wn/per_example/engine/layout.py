"""How a model used its layers in one step: what was verified once holds as long as this stays the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

from lightning_wn.per_example.engine.attention import AttentionCall
from lightning_wn.per_example.engine.call import Call
from lightning_wn.per_example.engine.layers import BatchDim

Layout: TypeAlias = tuple[Any, ...]
"""Equal for two steps that used the layers alike."""


def signature_of(
    calls: Sequence[Call],
    attentions: Sequence[AttentionCall],
    batch_size: int,
    terms: Sequence[int],
    shared: Sequence[int],
) -> Layout:
    """Return what is known before the backward pass.

    Args:
        calls: Calls of layers.
        attentions: Those that are followed in the graph.
        batch_size: B.
        terms: Places of parameters that have terms of the loss to themselves.
        shared: Places of parameters that meet the batch outside of layers.
    """
    signature: list[Layout] = [(call.layer.name, call.shared is not None, *call.axes(batch_size)) for call in calls]
    signature += [(attention.name, "graph") for attention in attentions]
    signature += [("term", place) for place in terms]
    return (*sorted(signature, key=str), *shared)


def arrivals_of(calls: Sequence[Call]) -> Layout:
    """Return which outputs got a gradient, as it is known after the backward pass."""
    return tuple(sorted((call.layer.name, *(output.arrivals for output in call.outputs)) for call in calls))


def dims_taken(calls: Sequence[Call], shared: Collection[int]) -> dict[str, BatchDim | None]:
    """Return the dimension in which each layer's examples were taken to be; None where they share what it gives.

    Args:
        calls: Calls of layers.
        shared: Parameters that meet the batch outside of layers, by identity.
    """
    return {
        call.layer.name: call.layer.batch_dim if call.shared is None else None
        for call in calls
        # what a module does with parameters that it adds to the batch is not looked at
        if not all(id(p) in shared for p in call.layer.parameters.values())
    }
