"""The layers that can be weight-normalized: one small rule per type, found by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_wn.weight_norm.core.parametrization import UnitLayout
from lightning_wn.weight_norm.core.recurrent import follow_weights, restore_weights


@dataclass(frozen=True)
class LayerRule:
    """What weight normalization has to know of one type of layer.

    Attributes:
        layout: Where the output units lie in each weight of a module of this type; in the rows, unless said.
        refusal: Why this module cannot be normalized, and the fix; None where it can.
        tensors: The names of its weights.
        parts: Submodules whose weights belong to it: whoever selects the module selects them.
        after_rewriting: What else has to change where weights are computed.
        after_folding: How to undo that.
    """

    layout: Callable[[Any], UnitLayout] = lambda module: UnitLayout()
    refusal: Callable[[Any], str | None] = lambda module: None
    tensors: Callable[[Any], tuple[str, ...]] = lambda module: ("weight",)
    parts: Callable[[Any], tuple[nn.Module, ...]] = lambda module: ()
    after_rewriting: Callable[[Any], None] = lambda module: None
    after_folding: Callable[[Any], None] = lambda module: None


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


def _recurrent_weights(module: nn.RNNBase) -> tuple[str, ...]:
    """The weights of all layers and directions; each gate of each hidden number is a unit."""
    return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))


def _input_projections(module: nn.MultiheadAttention) -> tuple[str, ...]:
    return ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")


_TRANSPOSED = LayerRule(layout=lambda module: UnitLayout(transposed=True, groups=module.groups))

_DEFAULT_RULES: dict[type[nn.Module], LayerRule] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), LayerRule()),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _TRANSPOSED),
}
RULES: dict[type[nn.Module], LayerRule] = _DEFAULT_RULES | {
    nn.Bilinear: LayerRule(),
    nn.RNNBase: LayerRule(tensors=_recurrent_weights, after_rewriting=follow_weights, after_folding=restore_weights),
    nn.RNNCellBase: LayerRule(tensors=lambda module: ("weight_ih", "weight_hh")),
    nn.MultiheadAttention: LayerRule(tensors=_input_projections, parts=lambda module: (module.out_proj,)),
    nn.Embedding: LayerRule(refusal=_refuse_embedding),
}
DEFAULT_TYPES: tuple[type[nn.Module], ...] = tuple(_DEFAULT_RULES)
"""What is normalized where nothing is selected."""


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule of the module's class or of its nearest base class that has one."""
    return next((RULES[cls] for cls in type(module).__mro__ if cls in RULES), None)


def supported_names() -> str:
    """Name the supported types, for error messages."""
    families = {nn.RNNBase: "LSTM, GRU, RNN", nn.RNNCellBase: "their cells"}
    return ", ".join(families.get(cls, cls.__name__) for cls in RULES)
