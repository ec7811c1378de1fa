"""Random projections of gradients: do the samples add up to the gradient that the optimizer uses?

A projection is a fixed linear function of a few elements of one parameter's gradient, the same one on every rank. Where
nothing but averaging lies between the samples and ``Parameter.grad``, their projections have the same mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_wn.noise_scale.samples import NUM_CHECKSUMS
from lightning_wn.probes.fsdp2.groups import ShardedGroup

_ELEMENTS = 64


class Projection:
    """A projection of a parameter's whole gradient; ``slot`` is which of the NUM_CHECKSUMS it is."""

    def __init__(self, parameter: nn.Parameter, slot: int, generator: torch.Generator) -> None:
        self.slot = slot
        places = [torch.randint(length, (_ELEMENTS,), generator=generator) for length in parameter.shape]
        self._places = tuple(place.to(parameter.device) for place in places)
        self.signs = torch.randn(_ELEMENTS, generator=generator).to(parameter.device)

    def pick(self, grad: Tensor) -> Tensor:
        """Return the elements, which :func:`project` sums up later."""
        return grad[self._places] if self._places else grad.expand(_ELEMENTS)


def project(
    picks: Sequence[tuple[Projection, Tensor]], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the projections in their slots, and the size of their terms, each of shape (NUM_CHECKSUMS,).

    What did not come is zero. A complex gradient is projected on its real part.
    """
    terms: list[Tensor] = [torch.zeros(_ELEMENTS, device=device, dtype=dtype)] * NUM_CHECKSUMS
    for projection, picked in picks:
        real = torch.view_as_real(picked)[..., 0] if picked.is_complex() else picked
        terms[projection.slot] = real.detach().to(dtype) * projection.signs
    stacked = torch.stack(terms)
    sizes: Tensor = torch.linalg.vector_norm(stacked, dim=1)
    return stacked.sum(1), sizes


def choose_projections(
    parameters: Sequence[nn.Parameter], averaged: Sequence[nn.Parameter] | None
) -> dict[int, Projection]:
    """Project the largest parameter and others spread over the model, by their places among the parameters.

    What DDP does not average (layers that are unfrozen later) differs between ranks, and must show: of that the largest
    is projected, too.
    """
    sizes = [p.numel() for p in parameters]
    known = {id(p) for p in parameters if averaged is None} | {id(p) for p in averaged or ()}
    apart = [size * (id(p) not in known) for p, size in zip(parameters, sizes, strict=True)]
    generator = _own_generator()
    chosen = enumerate(_spread(sizes, first=_spread(apart)[:1]))
    return {place: Projection(parameters[place], slot, generator) for slot, place in chosen}


class FlatProjection:
    """A projection of a parameter's gradient in its group's flat gradient, and in the shards of the mean.

    The flat gradient has one row a shard, and a row is the parameters' shards one after the other, each
    padded to equal length. The same elements can therefore be found in the flat gradient of every rank and,
    each on the one rank that holds it, in the optimizer's gradient.
    """

    def __init__(self, group: ShardedGroup, measured: set[int], slot: int, generator: torch.Generator) -> None:
        self.slot = slot
        lengths = group.padded_shard_lengths
        # of another optimizer's parameters, gradients may be left from another step
        own = [place for place, parameter in enumerate(group.parameters) if id(parameter) in measured]
        largest = max(own, key=lengths.__getitem__)
        self.parameter = group.parameters[largest]
        self._flat_length = group.flat_length
        count = min(_ELEMENTS, group.shard_size * lengths[largest])
        shard = torch.randint(group.shard_size, (count,), generator=generator)
        place = torch.randint(lengths[largest], (count,), generator=generator)
        signs = torch.randn(count, generator=generator)
        self._flat_places = (shard * sum(lengths) + sum(lengths[:largest]) + place).to(group.device)
        self._flat_signs = signs.to(group.device)
        with torch.no_grad():
            local = self.parameter.to_local()  # type: ignore[attr-defined]  # a DTensor
        # padding is zero in the flat gradient and nowhere in the shard
        mine = (shard == group.shard_rank) & (place < local.numel())
        self._shard_places = place[mine].to(local.device)
        self._shard_signs = signs[mine].to(local.device)

    def fits(self, flat_grad: Tensor) -> bool:
        """Whether all trainable parameters of the group are in it."""
        return flat_grad.numel() == self._flat_length

    def of_flat(self, flat_grad: Tensor) -> Tensor:
        """Return the projection of a flat gradient and the size of its terms, shape (2,)."""
        return _sum_and_size(flat_grad[self._flat_places], self._flat_signs)

    def of_shard(self, grad: Tensor) -> Tensor:
        """Return the same of this rank's shard of the parameter's gradient."""
        return _sum_and_size(grad.reshape(-1)[self._shard_places], self._shard_signs)


def choose_flat_projections(groups: Sequence[ShardedGroup], measured: set[int]) -> dict[int, FlatProjection]:
    """Project the group with most measured elements and others spread over the model, by their places."""
    sizes = [sum(p.numel() for p in group.parameters if id(p) in measured) for group in groups]
    generator = _own_generator()
    return {
        place: FlatProjection(groups[place], measured, slot, generator) for slot, place in enumerate(_spread(sizes))
    }


def _spread(sizes: Sequence[int], first: Sequence[int] = ()) -> list[int]:
    """Choose places, up to NUM_CHECKSUMS: the largest, and the ends and the middle of all that are not empty."""
    places = [place for place, size in enumerate(sizes) if size]
    if not places:
        return []
    largest = max(places, key=sizes.__getitem__)
    chosen = (*first, largest, places[0], places[-1], places[len(places) // 2])
    return [*dict.fromkeys(chosen)][:NUM_CHECKSUMS]


def _own_generator() -> torch.Generator:
    # training must draw the same random numbers with and without a probe; ranks project the same elements
    return torch.Generator().manual_seed(0)


def _sum_and_size(picked: Tensor, signs: Tensor) -> Tensor:
    wide = torch.promote_types(picked.dtype, torch.float32)
    terms = picked.to(wide) * signs.to(wide)
    return torch.stack((terms.sum(), torch.linalg.vector_norm(terms)))
