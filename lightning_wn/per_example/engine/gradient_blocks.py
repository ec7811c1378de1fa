"""Blocks of every parameter's gradient: do the examples add up to the gradient that the optimizer gets?

For a gradient that is known as Σ_t left_t ⊗ right_t, a block takes some columns of both factors, and nothing is
materialised. Parameters that are small are compared whole; of large ones another block in each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F  # noqa: N812  # as torch's own documentation spells it
from torch import Tensor, nn

from lightning_wn.per_example.engine.layers import Slot
from lightning_wn.per_example.rules.gradients import Block, Form, Rows
from lightning_wn.summing import summing_dtype

# rows or columns of a block; two cache lines
_WIDTH = 32

# tensors of constants; they change where other parameters turn out to be tables
_KEPT = 8

# golden section: the blocks of successive steps lie far apart
_STRIDE = 0.6180339887

# a gradient that is zero but for rounding (the key bias of attention) is judged by the others
_FLOOR = 1e-3

# a factor closer to one than this is rounding
_NO_FACTOR = 1e-4


@dataclass(frozen=True)
class Elements:
    """Elements of a gradient, the blocks of all parameters one after the other.

    Attributes:
        values: Real numbers, shape (elements,).
        sq_sizes: Squared size of each parameter's terms, however much they cancel, shape (parameters,).
    """

    values: Tensor
    sq_sizes: Tensor

    def __add__(self, other: Elements) -> Elements:
        """Return the elements of the sum of two gradients."""
        return Elements(self.values + other.values, self.sq_sizes + other.sq_sizes)

    def scaled(self, factor: float | Tensor) -> Elements:
        """Return the elements of a gradient that is so many times as long."""
        return Elements(self.values * factor, self.sq_sizes * factor * factor)


class GradientBlocks:
    """Chooses a block of each parameter, finds its elements in per-example gradients and in ``.grad``, and compares.

    Args:
        parameters: All that are measured.
        slots: What they are parts of.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], slots: Sequence[Slot]) -> None:
        self._parameters = tuple(parameters)
        self._places = {id(p): place for place, p in enumerate(parameters)}
        self._slots = {id(p): slot for slot in slots for p in slot.measured}
        self._shapes = {id(p): self._shape(p) for p in parameters}
        self._tables: set[int] = set()
        self._step = 0
        self._constants: dict[tuple[float, ...], Tensor] = {}

    def next_step(self) -> None:
        """Look at other blocks from here on."""
        self._step += 1

    def of_slot(self, slot: Slot, forms: Sequence[Form], along: Tensor | None) -> list[tuple[int, Tensor]]:
        """Return the block of Σ_i Σ_uses gradient of each measured parameter, after its place.

        Args:
            slot: Which parameters.
            forms: The gradient of each use.
            along: For a weight-normalized weight, Σ_i <gradient_i, v̂> of each unit.
        """
        weight = slot.weight_norm
        found: list[tuple[int, Tensor]] = []
        for parameter in slot.measured:
            place = self._places[id(parameter)]
            if place not in self._tables and any(isinstance(form, Rows) for form in forms):
                self._tables.add(place)
            block = self._block(parameter)
            if weight is None or along is None:
                part = forms[0].summed(slot.shape, block)
                for form in forms[1:]:
                    part = part + form.summed(slot.shape, block)
            elif parameter is weight.gain:
                part = along
            else:
                part = weight.summed(forms, slot.shape, along, block)
            found.append((place, part))
        return found

    def join(
        self, blocks: Sequence[tuple[int, Tensor]], sq_norms: Mapping[int, Tensor], device: torch.device
    ) -> Elements:
        """Join the blocks of one backward pass.

        Args:
            blocks: What :meth:`of_slot` gave.
            sq_norms: Σ_i |gradient_i|² of each parameter, by place.
            device: Where to put them.
        """
        known = dict(blocks)
        dtype = summing_dtype(device)
        zero = torch.zeros((), device=device)
        values: list[Tensor] = []
        sizes: list[Tensor] = []
        shares: list[float] = []
        for place, parameter in enumerate(self._parameters):
            block = self._block(parameter)
            count = self._count(parameter, block)
            part = known.get(place)
            values.append(zero.expand(count) if part is None else _flat(part).to(device))
            share = count / max(1, self._count(parameter, None))
            shares.append(share)
            sizes.append(sq_norms[place].to(device) if place in sq_norms else zero)
        return Elements(torch.cat(values).to(dtype), torch.stack(sizes).to(dtype) * self._on(device, tuple(shares)))

    def of_gradient(self, device: torch.device) -> Tensor:
        """Return the elements of ``Parameter.grad``, zeros where there is none."""
        dtype = summing_dtype(device)
        zero = torch.zeros((), device=device)
        values: list[Tensor] = []
        for parameter in self._parameters:
            block, grad = self._block(parameter), parameter.grad
            slot = self._slots.get(id(parameter))
            if slot is None or grad is None:
                values.append(zero.expand(self._count(parameter, block)))
                continue
            if slot.weight_norm is not None and parameter is slot.weight_norm.direction:
                grad = slot.weight_norm.units(grad)
            values.append(_flat(block.of(grad)).to(device))
        return torch.cat(values).to(dtype)

    def compare(self, samples: Elements, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Compare Σ_i g_i with the optimizer's gradient.

        Where the gradient is Σ_i g_i times one factor, as after clipping by norm, the factor is found.

        Args:
            samples: Of Σ_i g_i.
            gradient: Of ``Parameter.grad``.

        Returns:
            The factor, one unless it differs from it by more than rounding, and the largest difference that is left,
            relative to the size of the parameter's terms; both of shape ().
        """
        factor = (samples.values * gradient).sum() / samples.values.square().sum()
        unlikely = ~torch.isfinite(factor) | (factor.abs() < 1e-12) | ((factor - 1).abs() < _NO_FACTOR)
        factor = torch.where(unlikely, 1.0, factor)
        gradient = gradient / factor
        squares = torch.stack(((gradient - samples.values).square(), gradient.square()))
        sums = F.pad(squares.cumsum(1), (1, 0))[:, self._ends_on(gradient.device)]
        # what a sum in float64 loses is far below the floor
        difference, sizes = sums.diff(dim=1).clamp_min(0)
        sizes = (sizes + samples.sq_sizes).sqrt()
        allowed = (sizes + _FLOOR * sizes.max()).clamp_min(torch.finfo(sizes.dtype).tiny)
        return factor, (difference.sqrt() / allowed).max()

    def _shape(self, parameter: nn.Parameter) -> tuple[int, int]:
        slot = self._slots.get(id(parameter))
        if slot is not None and slot.weight_norm is not None:
            units = slot.weight_norm.gain.numel()
            return (1, units) if parameter is slot.weight_norm.gain else (units, parameter.numel() // max(1, units))
        return (parameter.shape[0], parameter.shape[1:].numel()) if parameter.ndim > 1 else (1, parameter.numel())

    def _block(self, parameter: nn.Parameter) -> Block:
        shape = rows, columns = self._shapes[id(parameter)]
        # some rows of a table may be kept from moving, and few get a gradient
        chosen = slice(0, rows) if self._places[id(parameter)] in self._tables else self._window(rows)
        return Block(shape, chosen, slice(0, columns) if rows == 1 else self._window(columns))

    def _window(self, length: int) -> slice:
        if length <= 2 * _WIDTH:
            return slice(0, length)
        start = int((self._step * _STRIDE) % 1.0 * (length - _WIDTH + 1))
        return slice(start, start + _WIDTH)

    def _count(self, parameter: nn.Parameter, block: Block | None) -> int:
        """How many real numbers there are in a block, or in all of the parameter."""
        count = parameter.numel()
        if block is not None:
            count = (block.rows.stop - block.rows.start) * (block.columns.stop - block.columns.start)
        return count * (2 if parameter.is_complex() else 1)

    def _ends_on(self, device: torch.device) -> Tensor:
        """Where each parameter's elements end, a zero before."""
        return self._on(device, (0, *accumulate(self._count(p, self._block(p)) for p in self._parameters)))

    def _on(self, device: torch.device, numbers: tuple[float, ...]) -> Tensor:
        """Return numbers on the device; a copy each time would wait for it."""
        if numbers not in self._constants:
            if len(self._constants) > _KEPT:
                self._constants.clear()
            self._constants[numbers] = torch.tensor(numbers).to(device)
        return self._constants[numbers]


def _flat(block: Tensor) -> Tensor:
    return (torch.view_as_real(block.resolve_conj()) if block.is_complex() else block).flatten()
