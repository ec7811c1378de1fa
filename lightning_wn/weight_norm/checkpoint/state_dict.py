"""The state dicts of weight-normalized layers: saved as plain weights where asked, loaded from any keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.weak import WeakIdKeyDictionary

from lightning_wn.weight_norm.checkpoint.keys import StoredWeight, find_weight, g_and_v_keys
from lightning_wn.weight_norm.core.cache import forget
from lightning_wn.weight_norm.core.mean_only_batch_norm import (
    NAME,
    drop_missing_means,
    load_mean_from_bias,
    save_mean_in_bias,
)
from lightning_wn.weight_norm.core.module_class import like
from lightning_wn.weight_norm.core.normalized_module import (
    g_and_v,
    in_order,
    is_sharded,
    normalized_weights,
    weight_norm_in,
)
from lightning_wn.weight_norm.core.parametrization import decompose

# where the weight of this g was last put in a state dict: layers that share g and v share one saved weight
_last_key: WeakIdKeyDictionary = WeakIdKeyDictionary()


def save_as_weights(layers: Iterable[nn.Module], as_weights: bool) -> None:
    """Choose what ``state_dict()`` of weight-normalized layers holds.

    Args:
        layers: The layers.
        as_weights: True for plain weights under their original names, False for g and v.
    """
    for layer in layers:
        for normalized in normalized_weights(layer).values():
            weight_norm_in(normalized).saved_as_weight = as_weights


def add_state_hooks(module: nn.Module) -> None:
    """Let a weight-normalized module save and load as this file says, once."""
    if _save not in module._state_dict_hooks.values():
        # functions of this file, and no closures, so that copies and pickles of the module keep them
        module._register_state_dict_hook(_save)  # type: ignore[no-untyped-call] # in torch
        module.register_load_state_dict_pre_hook(_load)  # type: ignore[no-untyped-call] # in torch
        module.register_load_state_dict_post_hook(_name_missing)  # type: ignore[no-untyped-call] # in torch


def remove_state_hooks(module: nn.Module) -> None:
    """Undo :func:`add_state_hooks`."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_save, _load, _name_missing):
                del hooks[key]


def _save(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any]) -> None:
    weights: dict[str, Tensor] = {}
    for name, normalized in normalized_weights(module).items():
        keys = g_and_v_keys(prefix, name)
        weight_norm = weight_norm_in(normalized)
        unknown = len(normalized) > 1 or is_sharded(normalized) or any(key not in state_dict for key in keys)
        if unknown or not weight_norm.saved_as_weight:
            continue
        weight = weight_norm(*(state_dict.pop(key) for key in keys))
        weights[name] = _shared(f"{prefix}{name}", g_and_v(normalized)[0], weight, state_dict)
    if weights:
        if "weight" in weights:
            save_mean_in_bias(module, state_dict, prefix)
        names = [name for name in (*module._parameters, *module._buffers) if f"{prefix}{name}" in state_dict]
        own = weights | {name: state_dict.pop(f"{prefix}{name}") for name in names}
        # in the order of the plain module, and what its children saved behind
        has_children = not {"parametrizations", NAME}.issuperset(module._modules)
        inner = [key for key in state_dict if key.startswith(prefix)] if has_children else []
        rest = {key: state_dict.pop(key) for key in inner}
        state_dict.update({f"{prefix}{name}": value for name, value in in_order(module, own).items()} | rest)


def _shared(key: str, g: Tensor, weight: Tensor, state_dict: dict[str, Tensor]) -> Tensor:
    other: str | None = _last_key.get(g)  # type: ignore[no-untyped-call] # in torch
    # the comparison makes sure that it is of this state dict, and of the same v
    if other is not None and other != key and other in state_dict and torch.equal(state_dict[other], weight):
        return state_dict[other]
    _last_key[g] = key
    return weight


def _load(  # noqa: PLR0917 # torch passes them so
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    forget(module)
    for name, normalized in normalized_weights(module).items():
        stored = find_weight(state_dict, prefix, name)
        if stored is None or _is_as_in_model(stored, normalized):
            continue
        for key in stored.keys:
            del state_dict[key]
        try:
            parts = _convert(stored, normalized)
        except ValueError as error:
            error_msgs.append(f"{prefix}{name} cannot be weight-normalized: {error}.")
            parts = g_and_v(normalized)
        state_dict.update(zip(g_and_v_keys(prefix, name), (part.detach() for part in parts), strict=True))
    load_mean_from_bias(module, state_dict, prefix)


def _is_as_in_model(stored: StoredWeight, normalized: Any) -> bool:
    shapes = [value.shape for value in stored.values]
    return shapes == [tensor.shape for tensor in g_and_v(normalized)] and ".parametrizations." in f".{stored.keys[0]}"


def _convert(stored: StoredWeight, normalized: Any) -> tuple[Tensor, Tensor]:
    g, v = g_and_v(normalized)
    if stored.shape != v.shape:
        raise ValueError(
            f"the checkpoint's has the shape {tuple(stored.shape)}, and the model's {tuple(v.shape)}: load the "
            "checkpoint of this architecture"
        )
    weight = stored.weight().to(v.dtype)
    if not v.is_meta:  # whose values `load_state_dict(assign=True)` takes as they are
        weight = weight.to(v.device)
    weight_norm = weight_norm_in(normalized)
    if not is_sharded(normalized) and not v.is_meta and torch.equal(weight, weight_norm(g, v)):
        return g, v  # the weight that it has: leave the length of v alone
    parts = decompose(weight, weight_norm.layout)
    return like(g, parts[0]), like(v, parts[1])


def _name_missing(module: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """Call a missing weight by the name that the plain model has for it, and a missing bias by its own."""
    missing = incompatible.missing_keys
    drop_missing_means(missing)
    for name in normalized_weights(module):
        first, second = g_and_v_keys("", name)
        for prefix in [key.removesuffix(first) for key in missing if key.endswith(first)]:
            if f"{prefix}{second}" in missing:
                missing[missing.index(f"{prefix}{first}")] = f"{prefix}{name}"
                missing.remove(f"{prefix}{second}")
