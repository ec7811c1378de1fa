"""What is summed over the parameters: the total, groups of them, and the gradient in the optimizer's units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_wn.noise_scale.probes.per_example.forms import Denominator, Form
from lightning_wn.noise_scale.probes.per_example.layers import Slot


class Columns:
    """Adds squared norms up: one column for all parameters, one a group, one for the preconditioned gradient.

    Args:
        groups: Parameters whose squared norms are summed apart; they may overlap.
        denominator: What each element of a parameter's gradient is divided by in the last column; None for a
            parameter that has none yet, which makes the column NaN.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], denominator: Denominator | None) -> None:
        self._groups = [{id(p) for p in group} for group in groups]
        self._denominator = denominator
        self._sq_norms: list[tuple[int, Tensor]] = []
        self._preconditioned: list[Tensor] = []

    def add(self, slot: Slot, forms: Sequence[Form]) -> None:
        """Square the gradients of one tensor's uses."""
        self._sq_norms += [(id(p), sq_norms) for p, sq_norms in slot.squared_norms(forms)]
        if self._denominator is not None:
            self._preconditioned.append(slot.preconditioned(forms, self._denominator))

    def sums(self, batch_size: int, device: torch.device | None) -> Tensor:
        """Return the sums, shape (B,), or (B, columns) where there is more than the total."""
        zeros = torch.zeros(batch_size, device=device)
        total = _sum([sq_norms for _, sq_norms in self._sq_norms], zeros)
        if not self._groups and self._denominator is None:
            return total
        columns = [total]
        columns += [_sum([sq for key, sq in self._sq_norms if key in group], zeros) for group in self._groups]
        if self._denominator is not None:
            columns.append(_sum(self._preconditioned, zeros))
        dtype = max((column.dtype for column in columns), key=lambda dtype: dtype.itemsize)
        return torch.stack([column.to(total.device, dtype) for column in columns], dim=1)

    def forget(self) -> None:
        """Forget the step."""
        self._sq_norms = []
        self._preconditioned = []


def _sum(terms: Sequence[Tensor], zeros: Tensor) -> Tensor:
    if not terms:
        return zeros
    # parts of a model may lie on several devices
    return torch.stack([term.to(terms[0].device) for term in terms]).sum(0)
