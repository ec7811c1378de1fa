"""What a weight-normalized module consists of: its chains of parametrizations, with g and v in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

from lightning_wn.weight_norm.core.parametrization import WeightNorm

MARK = "_weight_norm_names"
"""Where the class of a normalized module has the names of the tensors that it computes."""


def weight_norm_chains(module: nn.Module) -> dict[str, ParametrizationList]:
    """Return the chains through which this package computes tensors of a module, by the tensor's name.

    The first parametrization of each is a :class:`~lightning_wn.weight_norm.core.parametrization.WeightNorm`.

    Example:
        >>> from lightning_wn import apply_weight_norm
        >>> layer = nn.Linear(4, 3)
        >>> names = apply_weight_norm(layer)
        >>> list(weight_norm_chains(layer)), list(weight_norm_chains(nn.Linear(4, 3)))
        (['weight'], [])
    """
    return chains_of(module, WeightNorm)


def chains_of(module: nn.Module, kind: type[nn.Module]) -> dict[str, ParametrizationList]:
    """Return the chains of a module of which the first parametrization is of this kind, by the tensor's name."""
    chains = module._modules.get("parametrizations")
    if not isinstance(chains, nn.ModuleDict):
        return {}
    return {
        name: chain
        for name, chain in chains.items()
        if isinstance(chain, ParametrizationList) and isinstance(chain[0], kind)
    }


def weight_norm_of(module: nn.Module, name: str = "weight") -> WeightNorm | None:
    """Return the parametrization through which this package computes a tensor of the module, if it does."""
    chain = weight_norm_chains(module).get(name)
    return None if chain is None else weight_norm_in(chain)


def weight_norm_in(chain: ParametrizationList) -> WeightNorm:
    """Return the first parametrization of a chain of :func:`weight_norm_chains`."""
    first = chain[0]
    assert isinstance(first, WeightNorm)
    return first


def g_and_v(chain: ParametrizationList) -> tuple[Tensor, Tensor]:
    """Return what the chain computes from: g and v."""
    g, v = chain.original0, chain.original1
    assert isinstance(g, Tensor)
    assert isinstance(v, Tensor)
    return g, v


def is_sharded(chain: ParametrizationList) -> bool:
    """Tell whether g and v are spread over ranks, as by FSDP2 outside of the forward pass."""
    return any(isinstance(tensor, DTensor) for tensor in g_and_v(chain))


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
    chains = weight_norm_chains(module).values()
    return next((weight_norm_in(chain).order for chain in chains), tuple(module._parameters))


def in_order(module: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Sort a normalized module's tensors by name, as they are in the plain module."""
    return {name: tensors[name] for name in (*plain_order(module), *tensors) if name in tensors}


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
