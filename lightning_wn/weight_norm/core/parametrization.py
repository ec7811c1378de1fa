"""The mathematics of w = v · (g/‖v‖), and the small module that torch's parametrizations call for it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wn.weight_norm.core.fused import fused_norm, fused_weight

# a unit is brought to a largest entry of at most 2**limit and at least 2**-limit, so that its sum of squares
# neither overflows nor vanishes in the type that accumulates it
_EXPONENT_LIMIT = {torch.float32: 50, torch.float64: 400}
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class UnitLayout:
    """Where the output units lie in a weight.

    Attributes:
        transposed: False for weights of shape (out, ...), as of Linear, Conv and Embedding; True for
            transposed convolutions, whose weight has the shape (in, out / groups, ...).
        groups: The groups of a transposed convolution. Output unit ``k * (out / groups) + j`` is made of the
            entries ``[i, j]`` of the input channels ``i`` of group ``k``.
        per_tensor: Whether the whole weight is one unit.
    """

    transposed: bool = False
    groups: int = 1
    per_tensor: bool = False

    @property
    def in_rows(self) -> bool:
        """Whether units are the rows of the weight, and g has one number for each."""
        return not (self.transposed or self.per_tensor)

    @property
    def leading(self) -> int:
        """The number of leading dimensions that index units in :meth:`by_unit`."""
        return 2 if self.transposed and not self.per_tensor else 1

    def by_unit(self, weight: Tensor) -> Tensor:
        """View a weight with its units in front.

        That is (out, ...), or (groups, out / groups, in / groups, ...), or (1, ...) per tensor.
        """
        if self.per_tensor:
            return weight.unsqueeze(0)
        return self._grouped(weight) if self.transposed else weight

    def _grouped(self, weight: Tensor) -> Tensor:
        inputs, *rest = weight.shape
        return weight.view(self.groups, inputs // self.groups, *rest).movedim(2, 1)

    def from_units(self, rows: Tensor) -> Tensor:
        """Undo :meth:`by_unit`."""
        if self.per_tensor:
            return rows.squeeze(0)
        return rows.movedim(1, 2).flatten(0, 1) if self.transposed else rows

    def gain(self, per_unit: Tensor) -> Tensor:
        """Reshape one number per unit, as reduced from :meth:`by_unit`, to the shape in which g is stored.

        That is the rank of the weight, with all output units on the output dimension and 1 elsewhere:
        (out, 1, ...) or (1, out, 1, ...), in the order of the layer's output channels. Per tensor it is a scalar.
        """
        if self.per_tensor:
            return per_unit.reshape(())
        return per_unit.reshape(1, -1, *per_unit.shape[3:]) if self.transposed else per_unit


def unit_norm(v: Tensor, layout: UnitLayout) -> Tensor:
    """Return the norm of each unit, of the shape of :meth:`UnitLayout.by_unit` reduced to 1.

    Half types are accumulated and returned in float32, after rounding to their own type: g is stored in that
    type, and only against an equally rounded norm is g/‖v‖ exactly 1 where g = ‖v‖.
    """
    rows = layout.by_unit(v)
    dims = tuple(range(layout.leading, rows.ndim))
    accumulate = torch.float32 if v.dtype in _HALF else v.dtype
    norm: Tensor = torch.linalg.vector_norm(rows, dim=dims, keepdim=True, dtype=accumulate)
    return norm.to(v.dtype).to(accumulate)


def compose(g: Tensor, v: Tensor, layout: UnitLayout) -> Tensor:
    """Compute w = v · (g/‖v‖) (Salimans & Kingma, arXiv 1602.07868, section 2).

    The order matters: with g = ‖v‖ the ratio is exactly 1 and w is v, bit for bit. A unit with v = 0 has no
    direction: it gives w = 0 and finite gradients, as if ‖v‖ were 1.

    Args:
        g: The length of each unit, of the shape of :meth:`UnitLayout.gain`.
        v: The direction of each unit, of the shape of the weight.
        layout: Where the units lie.

    Returns:
        The weight, of the shape and type of ``v``.
    """
    if layout.in_rows and (fused := fused_weight(g, v)) is not None:
        return fused
    norm = unit_norm(v, layout)
    ratio = g.reshape(norm.shape).to(norm.dtype) / norm.masked_fill(norm == 0, 1.0)
    # half types are multiplied in float32 and rounded once; their gradients are summed in float32 too
    return layout.from_units((layout.by_unit(v) * ratio).to(v.dtype))


def decompose(weight: Tensor, layout: UnitLayout) -> tuple[Tensor, Tensor]:
    """Find g and v that :func:`compose` to the weight, bit for bit.

    For ordinary units v = w and g = ‖w‖. Two cases differ:

    - A zero unit has no direction, and with v = 0 it would never learn: no gradient reaches g. It gets g = 0
      and a random unit vector for v, from a generator of its own with a fixed seed. Then w = 0 (a zero may
      carry a minus sign), and
      ∂L/∂g = <∂L/∂w, v> moves it off zero, after which v learns. Units get different directions, so that
      they stay as distinct as their gradients are.
    - A unit so small or large that its squares leave the floating-point range is stored with v scaled by a
      power of two, which is exact.

    Args:
        weight: The weight, real and finite.
        layout: Where its units lie.

    Returns:
        g, of the shape of :meth:`UnitLayout.gain`, and v, of the shape and memory format of the weight.

    Raises:
        ValueError: If the weight is empty or not finite, or g cannot be represented in its type.
    """
    weight = weight.detach()
    if weight.numel() == 0:
        raise ValueError("its weight is empty: exclude the layer")
    if weight.is_meta:
        return layout.gain(unit_norm(weight, layout)).to(weight.dtype).contiguous(), torch.empty_like(weight)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("its weight holds NaN or infinite values: initialize it first, or exclude the layer")
    v = weight.clone()
    rows = layout.by_unit(v)
    peak = rows.abs().amax(tuple(range(layout.leading, rows.ndim)), keepdim=True)
    zero = peak == 0
    if bool(zero.any()):
        mask = zero.flatten(layout.leading - 1)
        rows[mask] = _directions(rows[mask])

    wide = peak.float() if weight.dtype in _HALF else peak
    exponent = torch.frexp(wide).exponent
    limit = _EXPONENT_LIMIT[wide.dtype]
    shift = exponent.clamp(-limit, limit) - exponent
    g = _norm_in_compose(v, layout)
    if bool(shift.any()):
        rows.copy_(_times_power_of_two(rows, shift))
        g = _times_power_of_two(_norm_in_compose(v, layout), -shift)
    g = layout.gain(g.masked_fill(zero, 0.0).to(weight.dtype)).contiguous()

    if not bool(torch.isfinite(g).all()):
        raise ValueError(
            f"a unit of its weight has a norm beyond the range of {weight.dtype}: convert the model to a "
            "wider type first, scale the weight down, or exclude the layer"
        )
    if not torch.equal(compose(g, v, layout), weight):
        raise ValueError(
            f"a unit of its weight spans more than the range of {weight.dtype} and would change: convert the "
            "model to a wider type first, or exclude the layer"
        )
    return g, v


def _norm_in_compose(v: Tensor, layout: UnitLayout) -> Tensor:
    """Return the norm by which :func:`compose` divides, bit for bit."""
    norm = unit_norm(v, layout)
    return fused_norm(v, norm) if layout.in_rows else norm


def _directions(units: Tensor) -> Tensor:
    """Draw one unit vector per row without touching the global random state."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(units.shape, generator=generator).flatten(1)
    lengths: Tensor = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    return (directions / lengths).view(units.shape).to(units)


def _times_power_of_two(tensor: Tensor, exponent: Tensor) -> Tensor:
    """Multiply by 2**exponent in two exact steps: one factor alone may be out of range."""
    half = exponent // 2
    for part in (half, exponent - half):
        # written bit by bit: a rounded exp2 would change the weight
        if tensor.dtype == torch.float64:
            factor = ((part.long() + 1023) << 52).view(torch.float64)
        else:
            factor = ((part.int() + 127) << 23).view(torch.float32).to(tensor.dtype)
        tensor = tensor * factor
    return tensor


class WeightNorm(nn.Module):
    """The parametrization that :mod:`torch.nn.utils.parametrize` calls to compute a weight from g and v.

    Registered on ``weight``, it puts g at ``parametrizations.weight.original0`` and v at
    ``parametrizations.weight.original1``, as torch spells its own weight norm.

    Args:
        layout: Where the output units lie in the weight.
    """

    def __init__(self, layout: UnitLayout) -> None:
        super().__init__()
        self.layout = layout
        # the Parameter that g and v took the place of, to recognise an optimizer that still holds it
        self.replaced: weakref.ref[nn.Parameter] | None = None
        # whether `state_dict()` of the layer holds the plain weight in place of g and v
        self.saved_as_weight = False
        # data-dependent initialization happens once
        self.saw_first_batch = False
        # the names of the module's parameters, so that folding can put the weight back in its place
        self.order: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        # a weak reference can be neither pickled nor followed by a copy
        return self.__dict__ | {"replaced": None}

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Compute the weight: see :func:`compose`."""
        return compose(g, v, self.layout)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Find g and v for an assigned weight: see :func:`decompose`."""
        return decompose(weight, self.layout)

    def extra_repr(self) -> str:
        """Show the layout where it is not the plain one."""
        if self.layout.per_tensor:
            return "per_tensor=True"
        return f"transposed=True, groups={self.layout.groups}" if self.layout.transposed else ""
