"""Random projections of gradients: do the samples add up to the gradient that the optimizer uses?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_wn.noise_scale.samples import NUM_CHECKSUMS

_ELEMENTS_PER_CHECKSUM = 64


class _Projection:
    """A fixed random linear function of a few elements of one parameter's gradient."""

    def __init__(self, parameter: nn.Parameter, slot: int, generator: torch.Generator) -> None:
        self.slot = slot
        places = [torch.randint(length, (_ELEMENTS_PER_CHECKSUM,), generator=generator) for length in parameter.shape]
        self._places = tuple(place.to(parameter.device) for place in places)
        signs = torch.randn(_ELEMENTS_PER_CHECKSUM, generator=generator)
        self.signs = signs.to(parameter.device)

    def pick(self, grad: Tensor) -> Tensor:
        """Return the elements, shape (_ELEMENTS_PER_CHECKSUM,)."""
        return grad[self._places] if self._places else grad.expand(_ELEMENTS_PER_CHECKSUM)


def _project(
    picks: Sequence[tuple[_Projection, Tensor]], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the projections in their slots, and the size of their terms, each of shape (NUM_CHECKSUMS,).

    What did not come is zero. A complex gradient is projected on its real part.
    """
    terms: list[Tensor] = [torch.zeros(_ELEMENTS_PER_CHECKSUM, device=device, dtype=dtype)] * NUM_CHECKSUMS
    for projection, picked in picks:
        real = torch.view_as_real(picked)[..., 0] if picked.is_complex() else picked
        terms[projection.slot] = real.detach().to(dtype) * projection.signs
    stacked = torch.stack(terms)
    sizes: Tensor = torch.linalg.vector_norm(stacked, dim=1)
    return stacked.sum(1), sizes


def _choose_projections(
    parameters: Sequence[nn.Parameter], averaged: Sequence[nn.Parameter] | None
) -> dict[int, _Projection]:
    """Project the largest parameter and others spread over the model; the same choice on every rank.

    What DDP does not average (layers that are unfrozen later) differs between ranks, and must show: of that the largest
    is projected, too.
    """
    last = len(parameters) - 1
    places = range(len(parameters))
    known = None if averaged is None else {id(p) for p in averaged}
    apart = [] if known is None else [i for i in places if id(parameters[i]) not in known]
    largest = [max(group, key=lambda i: parameters[i].numel()) for group in (apart, places) if group]
    chosen = [*dict.fromkeys((*largest, 0, last, last // 2))][:NUM_CHECKSUMS]
    # a generator of its own: training must draw the same random numbers with and without the probe
    generator = torch.Generator().manual_seed(0)
    return {
        index: _Projection(parameters[index], slot, generator)
        for slot, index in enumerate(chosen)
        if parameters[index].numel()
    }
