"""Which module answers for which parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_wn.noise_scale.preconditioning import Denominator
from lightning_wn.per_example.engine.batch_axes import has_own_axes
from lightning_wn.per_example.rules.errors import PerExampleError, name_of
from lightning_wn.per_example.rules.gradients import Form, preconditioned_sq_norms, squared_norms
from lightning_wn.per_example.rules.registry import Rule, is_measured_as_one, rule_for
from lightning_wn.per_example.rules.weight_normalized import NormalizedWeight, normalized_weight_of

BatchDim = int | Literal["folded"]


@dataclass
class Slot:
    """One tensor whose uses are added before squaring: a parameter, or a weight computed from g and v."""

    shape: torch.Size
    measured: tuple[nn.Parameter, ...]
    weight_norm: NormalizedWeight | None
    # of the running step
    calls: int = 0
    calls_in_backward: int = 0
    uses: list[Form] = field(default_factory=list)
    squared: bool = False

    def forget(self) -> None:
        """Forget the step."""
        self.calls = self.calls_in_backward = 0
        self.uses = []
        self.squared = False

    @property
    def expected(self) -> int:
        """How many gradients will arrive.

        Calls during backward are recomputations under checkpointing: with saved tensors (non-reentrant) they
        stand for a call that was already counted, otherwise they are all the calls that autograd knows.
        """
        return self.calls or self.calls_in_backward

    def squared_norms(self, forms: Sequence[Form]) -> tuple[list[tuple[nn.Parameter, Tensor]], Tensor | None]:
        """Return each measured parameter's |Σ_uses gradient|² per example, shape (B,).

        With them, of a weight-normalized weight, the sum over examples of each unit's gradient by g.
        """
        if self.weight_norm is None:
            return [(self.measured[0], squared_norms(forms, self.shape))], None
        by_gain, by_direction, along = self.weight_norm.squared_norms(forms, self.shape)
        parts = zip(self.weight_norm.parameters, (by_gain, by_direction), strict=True)
        return [(parameter, part) for parameter, part in parts if any(parameter is p for p in self.measured)], along

    def preconditioned(self, forms: Sequence[Form], denominator: Denominator) -> Tensor:
        """Return |Σ_uses gradient / denominator|² per example over the measured parameters, shape (B,)."""
        denominators = [denominator(p) for p in self.measured]
        known = [d.detach() for d in denominators if d is not None]
        if len(known) < len(denominators):
            return torch.full((forms[0].batch_size,), torch.nan, device=self.measured[0].device)
        if self.weight_norm is None:
            return preconditioned_sq_norms(forms, self.shape, known[0])
        by_parameter = {id(p): d for p, d in zip(self.measured, known, strict=True)}
        gain, direction = (by_parameter.get(id(p)) for p in self.weight_norm.parameters)
        return self.weight_norm.preconditioned(forms, self.shape, gain, direction)


@dataclass
class Layer:
    """A module that answers for parameters, by its rule or, without one, by being run again.

    Attributes:
        name: Its name in the model.
        module: The module.
        rule: Its rule, None for the generic one.
        slots: By the names that the rule uses (``weight``), or by parameter name for the generic rule.
        parameters: The measured parameters, by name in the module.
        batch_dim: Where the batch lies in its input and output.
        maybe_sequence_first: Whether the model has modules that put the sequence first, and nobody said where the
            batch lies.
        ways: Which way of running it again works, in training mode and out of it.
    """

    name: str
    module: nn.Module
    rule: Rule | None
    slots: dict[str, Slot]
    parameters: dict[str, nn.Parameter]
    batch_dim: BatchDim
    maybe_sequence_first: bool
    ways: dict[bool, int] = field(default_factory=dict)

    def count_call(self, *, in_backward: bool) -> None:
        """Note that it was called; in a backward pass that is a recomputation."""
        for slot in self.slots.values():
            if in_backward:
                slot.calls_in_backward += 1
            else:
                slot.calls += 1

    @property
    def axis(self) -> int:
        """The dimension that holds the batch, or the batch and the parts of its examples."""
        return 0 if self.batch_dim == "folded" else self.batch_dim

    @property
    def label(self) -> str:
        """How messages call it."""
        return name_of(self.module, self.name)


def find_layers(
    model: nn.Module, parameters: Sequence[nn.Parameter], batch_dims: Mapping[str, BatchDim]
) -> list[Layer]:
    """Divide the parameters among the modules that use them.

    Raises:
        ValueError: If a parameter is not in the model.
        PerExampleError: If a parameter is used in two ways that cannot be added.
    """
    wanted = {id(p) for p in parameters if p.requires_grad}
    slots: dict[tuple[int, ...], Slot] = {}
    layers: list[Layer] = []
    sequence_first = any(has_own_axes(m) and not m.batch_first for m in model.modules())
    for name, module in _owners(model):
        own = {key: p for key, p in _own_parameters(module).items() if id(p) in wanted}
        if not own:
            continue
        rule, weight_norm = rule_for(module), normalized_weight_of(module)
        if weight_norm is None and any(isinstance(m, ParametrizationList) for m in _inner(module)):
            rule = None  # an unknown parametrization: run the module again
        weight_norm = None if rule is None else weight_norm
        by_name: dict[str, Slot] = {}
        for key, parameter in own.items():
            of_weight = weight_norm is not None and any(parameter is part for part in weight_norm.parameters)
            normed = weight_norm if of_weight else None
            # tied layers share g and v: one slot for both
            parts = (parameter,) if normed is None else normed.parameters
            measured = tuple(part for part in parts if id(part) in wanted)
            slot = slots.setdefault(tuple(map(id, parts)), Slot(parts[-1].shape, measured, normed))
            by_name[key if normed is None else "weight"] = slot
        said = [dim for pattern, dim in batch_dims.items() if fnmatchcase(name, pattern)]
        batch_dim = said[0] if said else 0
        layers.append(Layer(name, module, rule, by_name, own, batch_dim, sequence_first and not said))
    _check_sharing(slots, layers)
    found = {id(p) for layer in layers for p in layer.parameters.values()}
    if wanted - found:
        raise ValueError(f"{len(wanted - found)} of the parameters to measure are not in the model")
    return layers


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are called, without what lies below those measured as one."""
    skipped: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in skipped:
            continue
        if is_measured_as_one(module):
            skipped |= {id(m) for m in module.modules()} - {id(module)}
        skipped |= {id(m) for m in _inner(module)}
        yield name, module


def _inner(module: nn.Module) -> list[nn.Module]:
    """List the modules that compute a module's parameters."""
    lists: object = getattr(module, "parametrizations", None)
    return list(lists.modules()) if isinstance(lists, nn.ModuleDict) else []


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    if is_measured_as_one(module):
        return dict(module.named_parameters())
    own = dict(module.named_parameters(recurse=False))
    if _inner(module):
        inner: object = module.parametrizations
        assert isinstance(inner, nn.ModuleDict)
        own |= {f"parametrizations.{key}": p for key, p in inner.named_parameters()}
    return own


def _check_sharing(slots: Mapping[tuple[int, ...], Slot], layers: Sequence[Layer]) -> None:
    """Refuse a parameter that is a weight in one place and part of a computed weight in another."""
    seen: set[int] = set()
    for ids in slots:
        if seen & set(ids):
            both = [layer.label for layer in layers if any(id(p) in ids for p in layer.parameters.values())]
            raise PerExampleError(
                f"a parameter of {' and '.join(both)} is shared but used in different ways (with and without weight "
                "normalization, or with different g): weight-normalize all of these layers alike, or none"
            )
        seen |= set(ids)
