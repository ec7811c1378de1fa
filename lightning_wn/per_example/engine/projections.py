"""Random projections of every parameter's gradient: do the examples add up to the gradient that the optimizer gets?

A parameter is viewed as a matrix (rows, columns), and its gradient G is projected to sᵀGu with random u and a few
random s. For a gradient that is known as Σ_t left_t ⊗ right_t that is Σ_t <s, left_t> <right_t, u>, so that nothing is materialised.
All elements take part: a change anywhere is seen in proportion to its size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_wn.per_example.engine.layers import Slot
from lightning_wn.per_example.rules.gradients import Form, as_real, project_forms

# a factor that all projections have in common is told from an edit: of few parameters, more are taken
_FEW = 8

# a gradient that is zero but for rounding (the key bias of attention) is judged by the others
_FLOOR = 1e-3
# a factor closer to one than this is rounding
_NO_FACTOR = 1e-4


class Projections:
    """The projections of the parameters, the same ones in every step.

    Args:
        parameters: All that are measured.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        self._places = {id(p): place for place, p in enumerate(parameters)}
        self.count = 2 if len(parameters) >= _FEW else 4
        """Projections of each parameter."""
        self._vectors: dict[int, tuple[Tensor, Tensor]] = {}

    def of_slot(self, slot: Slot, forms: Sequence[Form], along: Tensor | None) -> list[tuple[int, Tensor]]:
        """Return the projections of Σ_i Σ_uses gradient for each measured parameter, each (count,).

        Args:
            slot: Which parameters.
            forms: The gradient of each use.
            along: For a weight-normalized weight, Σ_i <gradient_i, v̂> of each unit.
        """
        if slot.weight_norm is None or along is None:
            (parameter,) = slot.measured
            vectors = self._vectors_of(parameter, *_matrix(parameter.shape))
            return [(self._places[id(parameter)], project_forms(forms, slot.shape, *vectors))]
        gain, direction = slot.weight_norm.parameters
        units = gain.numel()
        found = slot.weight_norm.project(
            forms,
            slot.shape,
            along,
            self._vectors_of(gain, units, 1)[0],
            self._vectors_of(direction, units, direction.numel() // max(units, 1)),
        )
        pairs = zip((gain, direction), found, strict=True)
        return [(self._places[id(p)], projected) for p, projected in pairs if any(p is q for q in slot.measured)]

    def of_gradients(self, slots: Sequence[Slot], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the same of ``Parameter.grad``, shape (parameters, count); zeros where there is none."""
        normed = {id(p): slot.weight_norm for slot in slots if slot.weight_norm is not None for p in slot.measured}
        rows: list[Tensor] = []
        for parameter in self._parameters:
            grad = parameter.grad
            if grad is None:
                rows.append(torch.zeros(self.count, device=device, dtype=dtype))
                continue
            matrix = grad.reshape(_matrix(parameter.shape))
            if (weight := normed.get(id(parameter))) is not None:
                matrix = grad.reshape(-1, 1) if parameter is weight.gain else weight.units(grad).flatten(1)
            left, right = self._vectors_of(parameter, *matrix.shape)
            wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
            by_row = wide[:, 0] * right.to(wide.dtype) if len(right) == 1 else torch.mv(wide, right.to(wide.dtype))
            projected = by_row @ left.to(wide.dtype)
            rows.append(as_real(projected).to(device, dtype))
        return torch.stack(rows)

    def _vectors_of(self, parameter: nn.Parameter, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        place = self._places.get(id(parameter), -1)
        if place not in self._vectors:
            # training must draw the same random numbers with and without a probe
            generator = torch.Generator().manual_seed(place + 1)
            dtype = torch.promote_types(parameter.dtype, torch.float32).to_real()
            left = torch.randn(rows, self.count, generator=generator)
            right = torch.ones(1) if columns == 1 else torch.randn(columns, generator=generator)
            self._vectors[place] = left.to(parameter.device, dtype), right.to(parameter.device, dtype)
        return self._vectors[place]


def compare(samples: Tensor, sq_sizes: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the projections of Σ_i g_i with those of the optimizer's gradient.

    Where the gradient is Σ_i g_i times one factor, as after clipping by norm, the factor is found.

    Args:
        samples: Of Σ_i g_i, shape (parameters, count).
        sq_sizes: Σ_i |g_i|² of each parameter, shape (parameters,): rounding is in proportion to its root.
        gradient: Of ``Parameter.grad``, like ``samples``.

    Returns:
        The factor, one unless it is larger than rounding, and the largest difference that is left, relative to the
        size of the parameter's terms; both of shape ().
    """
    factor = (samples * gradient).sum() / samples.square().sum()
    unlikely = ~torch.isfinite(factor) | (factor.abs() < 1e-12) | ((factor - 1).abs() < _NO_FACTOR)
    factor = torch.where(unlikely, 1.0, factor)
    sizes = sq_sizes.clamp_min(0).sqrt()
    allowed = (sizes + _FLOOR * sizes.max()).clamp_min(torch.finfo(sizes.dtype).tiny)
    difference = (gradient / factor - samples).abs().amax(1) / allowed
    return factor, difference.max()


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """View a parameter as rows and columns."""
    rows = shape[0] if shape else 1
    return rows, shape[1:].numel() if len(shape) > 1 else 1
