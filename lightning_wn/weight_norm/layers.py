"""The layers that can be weight-normalized: one small rule per type, found by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_wn.weight_norm.parametrization import UnitLayout


@dataclass(frozen=True)
class LayerRule:
    """What weight normalization has to know of one type of layer.

    Attributes:
        layout: Where the output units lie in the weight of a module of this type.
        refusal: Why this module cannot be normalized, and the fix; None where it can.
    """

    layout: Callable[[Any], UnitLayout]
    refusal: Callable[[Any], str | None] = lambda module: None


def _refuse_embedding(module: nn.Embedding) -> str | None:
    if module.sparse:
        return (
            "it has `sparse=True`, and the gradient of a computed weight is dense: "
            "build it with `sparse=False`, or exclude it"
        )
    if module.max_norm is not None:
        return (
            f"it has `max_norm={module.max_norm}`, which rescales rows in place and would be lost on a "
            "computed weight: build it with `max_norm=None`, or exclude it"
        )
    return None


_FIRST_DIM = LayerRule(layout=lambda module: UnitLayout())
_TRANSPOSED = LayerRule(layout=lambda module: UnitLayout(transposed=True, groups=module.groups))

RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: _FIRST_DIM,
    nn.Conv1d: _FIRST_DIM,
    nn.Conv2d: _FIRST_DIM,
    nn.Conv3d: _FIRST_DIM,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    nn.Embedding: LayerRule(layout=lambda module: UnitLayout(), refusal=_refuse_embedding),
}

DEFAULT_TYPES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule of the module's class or of its nearest base class that has one.

    Example:
        >>> rule_for(nn.Linear(2, 3)) is RULES[nn.Linear]
        True
        >>> rule_for(nn.LSTM(2, 3)) is None
        True
    """
    return next((RULES[cls] for cls in type(module).__mro__ if cls in RULES), None)


def supported_names() -> str:
    """Name the supported types, for error messages."""
    return ", ".join(cls.__name__ for cls in RULES)
