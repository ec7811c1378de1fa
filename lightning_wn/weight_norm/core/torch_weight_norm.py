"""torch's own two weight norms: find them in a module, and fold them into plain weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList

from lightning_wn.weight_norm.core.normalized_module import parametrized_weights, set_parameters, sort


def torch_normalized_weights(module: nn.Module) -> dict[str, ParametrizationList]:
    """Return the weights under ``torch.nn.utils.parametrizations.weight_norm``, by their names."""
    return parametrized_weights(module, parametrizations._WeightNorm)


def legacy_hooks(module: nn.Module) -> dict[str, Any]:
    """Return the hooks of the older ``torch.nn.utils.weight_norm``, by the name of the tensor."""
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    return {hook.name: hook for hook in hooks if is_legacy_hook(hook)}


def is_legacy_hook(hook: object) -> bool:
    """Whether a forward pre-hook is ``torch.nn.utils.weight_norm``'s."""
    # the function of that name hides the file that it is in, and with it the class
    return (type(hook).__module__, type(hook).__name__) == ("torch.nn.utils.weight_norm", "WeightNorm")


def remove_compatibility_hook(module: nn.Module) -> None:
    """Remove the hook by which torch's parametrizations read the older keys: a plain module has no use for it.

    It is a closure, so that the module could not be pickled either.
    """
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if getattr(hook, "__qualname__", "") == "weight_norm.<locals>._weight_norm_compat_hook":
            del module._load_state_dict_pre_hooks[key]


def legacy_g_and_v(module: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return g and v of a tensor under the older weight norm."""
    return cast("tuple[nn.Parameter, nn.Parameter]", tuple(getattr(module, f"{name}_{part}") for part in "gv"))


def legacy_weight(module: nn.Module, name: str) -> Tensor:
    """Compute a weight as the older weight norm does before the next forward pass."""
    with torch.no_grad():
        return cast(Tensor, legacy_hooks(module)[name].compute_weight(module))


def remove_legacy(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Put a plain weight in the place of g, v and the hook."""
    hook = legacy_hooks(module)[name]
    for key, other in list(module._forward_pre_hooks.items()):
        if other is hook:
            del module._forward_pre_hooks[key]
    delattr(module, name)
    for part in "gv":
        del module._parameters[f"{name}_{part}"]
    setattr(module, name, weight)  # recurrent layers keep a list of their weights, which this updates
    put_first(module, name)


def put_first(module: nn.Module, name: str) -> None:
    """Put a parameter where the plain module has it: before the others, or among those of a recurrent layer."""
    first = module._flat_weights_names if isinstance(module, nn.RNNBase) else [name]
    set_parameters(module, sort(module._parameters, first))
