"""Weights that are computed from a gain g and a direction v: gradients by g and v from the gradient by w.

With w_o = v_o · g_o/‖v_o‖ for every unit o, v̂ = v/‖v‖ and G the gradient by w (Salimans & Kingma,
arXiv 1602.07868, equation 3): ∂g_o = <G_o, v̂_o> and ∂v_o = g_o/‖v_o‖ · (G_o - <G_o, v̂_o> v̂_o). Their squared
norms need two numbers a unit: row² = |G_o|² and along = <G_o, v̂_o>.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_wn.per_example.rules.gradients import Block, Form, Outer, Rows, add_dense, add_forms, dense_chunks
from lightning_wn.weight_norm.core.parametrization import WeightNorm, unit_norm
from lightning_wn.weight_norm.core.torch_weight_norm import legacy_g_and_v, legacy_hooks


@dataclass(frozen=True)
class NormalizedWeight:
    """How one weight is made of g and v.

    Attributes:
        gain: The parameter g.
        direction: The parameter v, of the shape of the weight.
        units: Brings a weight into the shape (units, ...), in the order of g.
        norm: Computes the norm of each unit of v, of any shape with one element a unit.
        leading: Whether the units are the rows of the weight's first dimension.
    """

    gain: nn.Parameter
    direction: nn.Parameter
    units: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor]
    leading: bool

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The pair (g, v)."""
        return self.gain, self.direction

    @torch.no_grad()
    def squared_norms(self, forms: Sequence[Form], shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Return |∂g|² and |∂v|² per example, each of shape (B,), and Σ_i ∂g_i of each unit, shape (units,).

        Args:
            forms: The gradient by w of each use of the weight.
            shape: The shape of the weight.
        """
        ratio, unit = self._ratio_and_unit(forms[0].dtype)
        row_sq, along, place = _by_unit(add_forms(forms, shape), shape, unit, self)
        along_sq = along.square()
        ratio_sq = ratio.square() if place is None else ratio.square()[place]
        # rounding can make the difference of a gradient along v̂ negative
        by_direction = (ratio_sq * (row_sq - along_sq).clamp_min(0)).sum(1)
        if place is None:
            return along_sq.sum(1), by_direction, along.sum(0)
        total = torch.zeros_like(ratio).index_add_(0, place.flatten(), along.flatten())
        return along_sq.sum(1), by_direction, total

    @torch.no_grad()
    def summed(self, forms: Sequence[Form], shape: torch.Size, along: Tensor, block: Block) -> Tensor:
        """Return a block of Σ_i ∂v_i, with a unit in each row, shape (rows, columns).

        Args:
            forms: The gradient by w of each use of the weight.
            shape: The shape of the weight.
            along: Σ_i ∂g_i, shape (units,).
            block: Which units, and which of their elements.
        """
        ratio, unit = self._ratio_and_unit(forms[0].dtype)
        if self.leading:
            by_weight = torch.stack([form.summed(shape, block) for form in forms]).sum(0)
        else:
            whole = torch.stack([grad.sum(0) for grad in dense_chunks(forms, shape)]).sum(0)
            by_weight = block.of(self.units(whole))
        ratio, unit, along = ratio[block.rows], unit[block.rows, block.columns], along[block.rows]
        return ratio.unsqueeze(1) * (by_weight - along.unsqueeze(1) * unit)

    @torch.no_grad()
    def preconditioned(
        self, forms: Sequence[Form], shape: torch.Size, gain: Tensor | None, direction: Tensor | None
    ) -> Tensor:
        """Return |∂g / gain|² + |∂v / direction|² per example, shape (B,).

        Args:
            forms: The gradient by w of each use of the weight.
            shape: The shape of the weight.
            gain: What to divide the gradient by g by, of its shape; None where g is not measured.
            direction: The same for v.
        """
        ratio, unit = self._ratio_and_unit(forms[0].dtype)
        chunks: list[Tensor] = []
        for grad in dense_chunks(add_forms(forms, shape), shape):
            by_unit = torch.vmap(self.units)(grad).flatten(2)
            along = (by_unit * unit).sum(2)
            total = torch.zeros_like(along[:, 0])
            if gain is not None:
                total = total + (along / gain.to(along.dtype).flatten()).square().sum(1)
            if direction is not None:
                by_direction = ratio.unsqueeze(1) * (by_unit - along.unsqueeze(2) * unit)
                divided = by_direction / self.units(direction).to(along.dtype).flatten(1)
                total = total + divided.square().sum((1, 2))
            chunks.append(total)
        return torch.cat(chunks)

    def _ratio_and_unit(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return g/‖v‖, shape (units,), and v̂, shape (units, elements of a unit)."""
        norm = self.norm(self.direction).to(dtype).flatten()
        # a unit without direction counts as if its norm were 1, and then its v̂ is 0
        norm = norm.masked_fill(norm == 0, 1.0)
        unit = self.units(self.direction.detach()).to(dtype).flatten(1) / norm.unsqueeze(1)
        return self.gain.detach().to(dtype).flatten() / norm, unit


def _by_unit(
    forms: Sequence[Form], shape: torch.Size, unit: Tensor, weight: NormalizedWeight
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return row² and along, each (B, units); or of some units for each example, and which these are."""
    if weight.leading and len(forms) == 1:
        (form,) = forms
        if isinstance(form, Outer):
            row_sq, along = form.by_row(unit.reshape(form.left.shape[1], -1, unit.shape[1]))
            return row_sq, along, None
        if isinstance(form, Rows):
            rows = form.distinct()
            along = (rows.values * unit[rows.index]).sum(2)
            return rows.values.square().sum(2), along, rows.index
    grad = add_dense(forms, shape)
    by_unit = torch.vmap(weight.units)(grad).flatten(2)
    return by_unit.square().sum(2), (by_unit * unit).sum(2), None


def normalized_weight_of(module: nn.Module) -> NormalizedWeight | None:
    """Find g and v if the module's ``weight`` is weight-normalized, in any spelling, and nothing else is done to it."""
    chains: Any = getattr(module, "parametrizations", {})
    if list(chains) == ["weight"] and len(chains["weight"]) == 1:
        chain = chains["weight"]
        step = chain[0]
        if type(step) is WeightNorm:
            return _of_this_package(chain.original0, chain.original1, step)
        if type(step) is parametrizations._WeightNorm:
            return _of_torch(chain.original0, chain.original1, step.dim)
    hook = legacy_hooks(module).get("weight")
    return None if hook is None else _of_torch(*legacy_g_and_v(module, "weight"), hook.dim)


def _of_this_package(gain: nn.Parameter, direction: nn.Parameter, step: WeightNorm) -> NormalizedWeight:
    layout = step.layout
    return NormalizedWeight(
        gain,
        direction,
        units=lambda weight: layout.by_unit(weight).flatten(0, layout.leading - 1),
        norm=lambda weight: unit_norm(weight, layout),
        leading=layout.in_rows,
    )


def _of_torch(gain: nn.Parameter, direction: nn.Parameter, dim: int | None) -> NormalizedWeight:
    if dim is None or dim == -1:  # torch takes -1 for "no dimension": the whole weight is one unit
        return NormalizedWeight(gain, direction, lambda weight: weight.unsqueeze(0), Tensor.norm, leading=False)
    return NormalizedWeight(
        gain,
        direction,
        units=lambda weight: weight.movedim(dim, 0),
        norm=lambda weight: torch.norm_except_dim(weight, 2, dim),
        leading=dim == 0,
    )
