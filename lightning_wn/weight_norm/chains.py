"""What a weight-normalized module consists of: its chains of parametrizations, with g and v in each."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

from lightning_wn.weight_norm.parametrization import WeightNorm


def weight_norm_chains(module: nn.Module) -> dict[str, ParametrizationList]:
    """Return the chains through which this package computes tensors of a module, by the tensor's name.

    The first parametrization of each is a :class:`~lightning_wn.weight_norm.parametrization.WeightNorm`.

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
