"""Which parameters are measured, and how their squared norms add up to those of groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_wn.module_selectors import ModuleSelection, as_selectors, matcher, show_selection
from lightning_wn.noise_scale.norms import foreach_norms, norm_dtype
from lightning_wn.noise_scale.preconditioning import Denominator, divide
from lightning_wn.summing import summing_dtype
from lightning_wn.text import some


class MeasuredParameters:
    """The parameters whose gradient is measured, and the sets of them that are measured beside all of them.

    A probe measures squared norms of single parameters' gradients; :meth:`add_up` makes of them the squared norms
    of all parameters together, of each group, and of the preconditioned gradient, in this order.

    Args:
        parameters: All that are measured.
        groups: Members of each group, in any order; a parameter may be in several groups or in none.
        denominator: From a parameter to the positive diagonal that its gradient is divided by in the
            preconditioned norm, or to None while there is none yet; without it nothing is preconditioned.
        coverage: Measured share of the trainable parameters' elements: of all, and of each group.

    Example:
        >>> first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
        >>> measured = MeasuredParameters([first, second], groups=[[second]])
        >>> measured.add_up([0, 1], torch.tensor([1.0, 4.0], dtype=torch.float64))
        tensor([5., 4.], dtype=torch.float64)
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        groups: Sequence[Sequence[nn.Parameter]] = (),
        denominator: Denominator | None = None,
        coverage: Sequence[float] | None = None,
    ) -> None:
        self.parameters = tuple(parameters)
        self.denominator = denominator
        self.coverage = tuple(coverage or [1.0] * (1 + len(groups)))
        self.groups = tuple(tuple(group) for group in groups)
        self._members = [{id(p) for p in group} for group in groups]
        self._matrices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Device of the first parameter, where sums are kept."""
        return self.parameters[0].device

    @property
    def single_column(self) -> bool:
        """Whether only the norm of all together is wanted."""
        return not self.groups and self.denominator is None

    def add_up(self, places: Sequence[int], sq_norms: Tensor, preconditioned: Tensor | None = None) -> Tensor:
        """Add squared norms of single parameters up to those of all, each group, and the preconditioned gradient.

        Args:
            places: Positions in ``parameters`` that the norms belong to, one each, repeats allowed.
            sq_norms: Squared norms, shape (n,), or (n, B) of B examples.
            preconditioned: Squared norms of preconditioned gradients to add up, shape (any number,) or (..., B).

        Returns:
            Shape () or (B,) where only all together is measured, else (columns,) or (columns, B).
        """
        if self.single_column:
            return sq_norms.sum(0)
        key = (tuple(places), sq_norms.device)
        matrix = self._matrices.get(key)
        if matrix is None:
            members = [[1.0] * len(places)]
            members += [[float(id(self.parameters[p]) in group) for p in places] for group in self._members]
            matrix = torch.tensor(members, dtype=sq_norms.dtype).reshape(len(members), len(places)).to(sq_norms.device)
            self._matrices[key] = matrix
        columns: Tensor = matrix @ sq_norms
        if self.denominator is None:
            return columns
        total = (sq_norms if preconditioned is None else preconditioned).sum(0)
        return torch.cat((columns, total.unsqueeze(0)))

    def preconditioned_norm(self, place: int, gradient: Tensor) -> Tensor:
        """Return |Pg| of one parameter's gradient, NaN while there is no denominator yet; shape ()."""
        assert self.denominator is not None
        denominator = self.denominator(self.parameters[place])
        if denominator is None:
            return torch.full((), torch.nan, device=gradient.device)
        norm: Tensor = torch.linalg.vector_norm(divide(gradient, denominator), dtype=norm_dtype(gradient.dtype))
        return norm

    def sq_norms_of(self, gradients: Sequence[Tensor | None], scale: Tensor) -> Tensor:
        """Return the columns of :meth:`add_up` for whole gradients, one a parameter, times ``scale`` each."""
        places = [place for place, gradient in enumerate(gradients) if gradient is not None]
        present = [gradient for gradient in gradients if gradient is not None]
        dtype = summing_dtype(self.device)

        def squares(norms: Sequence[Tensor]) -> Tensor:
            stacked = torch.stack([norm.to(self.device) for norm in norms]) if norms else torch.zeros(0)
            return (stacked.to(self.device, dtype) * scale.to(self.device)).square()

        preconditioned = None
        if self.denominator is not None:
            preconditioned = squares([self.preconditioned_norm(p, g) for p, g in zip(places, present, strict=True)])
        return self.add_up(places, squares(foreach_norms(present)), preconditioned)

    def sq_norms_of_optimizers_gradient(self, scale: Tensor) -> Tensor:
        """Return the columns of :meth:`add_up` for ``Parameter.grad``, times ``scale``."""
        return self.sq_norms_of([parameter.grad for parameter in self.parameters], scale)


def find_measured(
    model: nn.Module,
    trainable: Sequence[nn.Parameter],
    *,
    layers: ModuleSelection | None,
    groups: Mapping[str, ModuleSelection],
    denominator: Denominator | None = None,
) -> MeasuredParameters:
    """Find the parameters that the arguments ``layers`` and ``groups`` name.

    A parameter belongs to what is named if its own qualified name matches a glob, or if an entry matches a module
    that holds it, at any depth.

    Args:
        model: The model.
        trainable: What the optimizer moves.
        layers: What to measure; None is all.
        groups: What to measure beside the total, by name.
        denominator: See :class:`MeasuredParameters`.

    Raises:
        ValueError: If an entry matches no trainable parameter, or a group none that is measured.
    """
    chosen = {id(p) for p in (trainable if layers is None else _named("layers", layers, model, trainable))}
    measured = [p for p in trainable if id(p) in chosen]
    members, coverage = [], [_share(measured, trainable)]
    for name, selection in groups.items():
        named = _named(f"groups[{name!r}]", selection, model, trainable)
        group = [p for p in named if id(p) in chosen]
        if not group:
            raise ValueError(
                f"`groups[{name!r}]={show_selection(selection)}` names only parameters that "
                f"`layers={show_selection(layers)}` leaves out; widen `layers` or drop the group."
            )
        members.append(group)
        coverage.append(_share(group, named))
    return MeasuredParameters(measured, groups=members, denominator=denominator, coverage=coverage)


def are_lazy(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether some have no shape yet, as those of lazy layers before their first batch."""
    return any(isinstance(parameter, UninitializedParameter) for parameter in parameters)


def _named(
    argument: str, selection: ModuleSelection, model: nn.Module, trainable: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    found: set[int] = set()
    for entry in as_selectors(argument, selection):
        matches = matcher(entry)
        hits: set[int] = set()
        for name, module in model.named_modules(remove_duplicate=False):
            if name and matches(name, module):
                hits |= {id(p) for p in module.parameters()}
        if isinstance(entry, str):
            named = model.named_parameters(remove_duplicate=False)
            hits |= {id(p) for name, p in named if matches(name, nn.Module())}
        if not any(id(p) in hits for p in trainable):
            names = [name for name, p in model.named_parameters() if any(p is q for q in trainable)]
            raise ValueError(
                f"`{argument}={show_selection(entry)}` matches no trainable parameter of {type(model).__name__}: the "
                f"optimizer moves {some(names)}; name modules or parameters by a glob such as 'encoder.*' or by a type."
            )
        found |= hits
    return [p for p in trainable if id(p) in found]


def _share(part: Sequence[nn.Parameter], whole: Sequence[nn.Parameter]) -> float:
    return sum(p.numel() for p in part) / max(sum(p.numel() for p in whole), 1)
