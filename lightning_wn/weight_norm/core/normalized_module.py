"""What a weight-normalized module consists of: its normalized weights, with g and v in each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

from lightning_wn.weight_norm.core.parametrization import WeightNorm

T = TypeVar("T")

MARK = "_weight_norm_names"
"""Where the class of a normalized module has the names of the tensors that it computes."""


def normalized_weights(module: nn.Module) -> dict[str, ParametrizationList]:
    """Return the weights of a module that this package computes, by their names.

    Each is the list of its parametrizations, of which the first is a
    :class:`~lightning_wn.weight_norm.core.parametrization.WeightNorm`.
    """
    return parametrized_weights(module, WeightNorm)


def parametrized_weights(module: nn.Module, kind: type[nn.Module]) -> dict[str, ParametrizationList]:
    """Return the weights of a module of which the first parametrization is of this kind, by their names."""
    found = module._modules.get("parametrizations")
    if not isinstance(found, nn.ModuleDict):
        return {}
    return {
        name: weight
        for name, weight in found.items()
        if isinstance(weight, ParametrizationList) and isinstance(weight[0], kind)
    }


def named_normalized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each layer with normalized weights once, with the prefix of the names in it."""
    seen = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if name.endswith("parametrizations") or id(layer) in seen or not normalized_weights(layer):
            continue
        seen.add(id(layer))
        # an averaged model holds the model as `module`
        yield f"{name}.".removeprefix("module.").removeprefix("."), layer


def named_normalized_weights(model: nn.Module) -> Iterator[tuple[str, ParametrizationList]]:
    """Yield every normalized weight by its name in the model, except those that are sharded."""
    for prefix, layer in named_normalized_layers(model):
        for name, normalized in normalized_weights(layer).items():
            if not is_sharded(normalized):
                yield f"{prefix}{name}", normalized


def weight_norm_of(module: nn.Module, name: str = "weight") -> WeightNorm | None:
    """Return the parametrization through which this package computes a tensor of the module, if it does."""
    normalized = normalized_weights(module).get(name)
    return None if normalized is None else weight_norm_in(normalized)


def weight_norm_in(normalized: ParametrizationList) -> WeightNorm:
    """Return the first parametrization of a normalized weight."""
    first = normalized[0]
    assert isinstance(first, WeightNorm)
    return first


def g_and_v(normalized: ParametrizationList) -> tuple[Tensor, Tensor]:
    """Return what a normalized weight is computed from: g and v."""
    g, v = normalized.original0, normalized.original1
    assert isinstance(g, Tensor)
    assert isinstance(v, Tensor)
    return g, v


def is_sharded(normalized: ParametrizationList) -> bool:
    """Tell whether g and v are spread over ranks, as by FSDP2 outside of the forward pass."""
    return any(isinstance(tensor, DTensor) for tensor in g_and_v(normalized))


def reshard(module: nn.Module) -> None:
    """Let a model have its sharded Parameters: FSDP2's outermost modules keep whole ones after an evaluation."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def plain_class(module: nn.Module) -> Any:
    """Return the class of a normalized module without its normalization; FSDP2 puts another on top of both.

    Args:
        module: A module whose class :func:`~lightning_wn.weight_norm.core.module_class.compute_through_class` made.
    """
    return next(cls for cls in type(module).__mro__ if MARK in vars(cls)).__bases__[0]


def plain_order(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters in the order that they have while it is plain."""
    normalized = normalized_weights(module).values()
    return next((weight_norm_in(weight).order for weight in normalized), tuple(module._parameters))


def in_order(module: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """Sort a normalized module's tensors by name, as they are in the plain module."""
    return sort(tensors, plain_order(module))


def sort(tensors: Mapping[str, T], order: Iterable[str]) -> dict[str, T]:
    """Put the tensors of these names first."""
    return {name: tensors[name] for name in (*order, *tensors) if name in tensors}


def set_parameters(module: nn.Module, parameters: Mapping[str, Any]) -> None:
    """Let a module have these Parameters, in this order."""
    parameters = dict(parameters)
    module._parameters.clear()
    module._parameters.update(parameters)


def has_plain_weight(module: nn.Module, tensor: str = "weight") -> bool:
    """Tell whether a weight of the module is a Parameter of its own, and not computed from others."""
    return module._parameters.get(tensor) is not None


def plain_weight(module: nn.Module, tensor: str = "weight") -> nn.Parameter:
    """Return the weight of a module that has a plain one: see :func:`has_plain_weight`."""
    weight = module._parameters[tensor]
    assert weight is not None
    return weight
