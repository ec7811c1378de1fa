"""Rules, found by class: from a layer's input and its output's gradient to per-example gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_wn.per_example.rules.gradients import Form


@dataclass(frozen=True)
class Seen:
    """What a rule gets to see of one call of its layer, in float32 at least.

    Attributes:
        input: The layer's first argument, shape (N, ...): the batch dimension is first.
        grad: The gradient of the loss by the layer's output, shape (N, ...).
        needed: Names of the parameters to answer for.
    """

    input: Tensor
    grad: Tensor
    needed: frozenset[str]


Rule = Callable[[Any, Seen], Mapping[str, Form | Tensor]]
"""Takes the module and what was seen of one call; answers with each needed parameter's per-example gradients."""

AnyRule = TypeVar("AnyRule", bound=Rule)

_RULES: dict[type[nn.Module] | str, Rule] = {}
_ANY_FORWARD: set[type[nn.Module] | str] = set()


def register_per_example_rule(
    *classes: type[nn.Module] | str, any_forward: bool = False
) -> Callable[[AnyRule], AnyRule]:
    """Register a rule for the per-example gradients of a type of module.

    A rule answers for the parameters by the name under which the module uses them (``"weight"``, whether or
    not that is computed from other parameters by weight normalization). A plain tensor of shape
    (N, *parameter) is enough; :class:`Outer` and :class:`Rows` spare memory.

    The rule holds for subclasses too, as long as they do not override ``forward``: it could compute anything.

    Args:
        classes: The module classes; one of a package that may not be installed as ``"module.Class"``.
        any_forward: Whether the rule also holds for subclasses with a ``forward`` of their own.

    Returns:
        A decorator that returns its function.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self, features: int) -> None:
        ...         super().__init__()
        ...         self.scale = nn.Parameter(torch.ones(features))
        ...
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return x * self.scale
        >>> @register_per_example_rule(Scale)
        ... def scale(module: Scale, seen: Seen) -> dict[str, Tensor]:
        ...     return {"scale": (seen.input * seen.grad).flatten(1, -2).sum(1)}  # (N, ..., features)
    """

    def decorate(rule: AnyRule) -> AnyRule:
        for cls in classes:
            _RULES[cls] = rule
            (_ANY_FORWARD.add if any_forward else _ANY_FORWARD.discard)(cls)
        return rule

    return decorate


def rule_for(module: nn.Module) -> Rule | None:
    """Return the rule of the module's class or of its nearest base class, or None."""
    for cls in type(module).__mro__:
        for key in (cls, f"{cls.__module__}.{cls.__qualname__}"):
            if key in _RULES:
                return _RULES[key] if key in _ANY_FORWARD or computes_like(module, cls) else None
    return None


def computes_like(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether no method that the class's forward is made of was overridden in the module or its own class."""
    if "forward" in vars(module):
        return False
    methods = [name for name in ("forward", "_conv_forward", "_norm", "_output_padding") if hasattr(cls, name)]
    return all(getattr(type(module), name, None) is getattr(cls, name) for name in methods)


_AS_ONE: set[type[nn.Module]] = {nn.MultiheadAttention}


def measure_as_one(*classes: type[nn.Module]) -> None:
    """Register modules that use the parameters of their children without calling the children.

    Such a module is measured whole, by running it again example by example.
    """
    _AS_ONE.update(classes)


def is_measured_as_one(module: nn.Module) -> bool:
    """Whether the module answers for all parameters below it."""
    return any(cls in _AS_ONE for cls in type(module).__mro__)
