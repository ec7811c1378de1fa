"""The class of a weight-normalized module: how its weight is read, assigned, initialized and pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.parametrize import ParametrizationList

from lightning_wn.text import some
from lightning_wn.weight_norm.core.cache import forget, kept
from lightning_wn.weight_norm.core.normalized_module import (
    MARK,
    g_and_v,
    in_order,
    is_sharded,
    normalized_weights,
    plain_class,
    set_parameters,
    weight_norm_in,
)
from lightning_wn.weight_norm.core.parametrization import decompose
from lightning_wn.weight_norm.core.recurrent import follow_in_class

# while a module initializes itself: what it writes to, by the module's id and the tensor's name
_being_initialized: dict[int, dict[str, Tensor]] = {}


def compute_through_class(module: nn.Module, name: str) -> None:
    """Let the class that torch made for this parametrized module read a normalized weight in our way.

    torch's own property calls three modules for each weight and keeps no weight for a scope; its class
    refuses to be pickled and loses what ``reset_parameters`` writes.

    Args:
        module: A module whose class is its own, as ``register_parametrization`` makes it.
        name: The name of the normalized tensor.
    """
    _equip(type(module), name)
    normalized = normalized_weights(module)[name]
    if hasattr(module, "reset_parameters") and any(tensor.is_meta for tensor in g_and_v(normalized)):
        # Lightning asks every module that owns parameters to initialize them, once materialized; this one
        # knows only g and v, and its owner may have no other parameters
        has_others = any(p is not None for p in module._parameters.values())
        cast(Any, normalized).reset_parameters = _done_by_owner if has_others else module.reset_parameters


def _equip(cls: Any, name: str) -> None:
    setattr(cls, MARK, (*vars(cls).get(MARK, ()), name))
    cls.__jit_unused_properties__ = [*getattr(cls, "__jit_unused_properties__", ()), name]
    cls.__reduce_ex__ = _reduce
    cls._apply = _apply
    setattr(cls, name, _computed(name))
    if hasattr(cls, "reset_parameters"):
        cls.reset_parameters = _reset_parameters


def store(normalized: ParametrizationList, weight: Tensor) -> None:
    """Set g and v, in place, so that they compose to this weight, which may be sharded.

    Raises:
        ValueError: If the weight cannot be represented: see
            :func:`~lightning_wn.weight_norm.core.parametrization.decompose`.
    """
    with torch.no_grad():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        parts = decompose(whole, weight_norm_in(normalized).layout)
        for target, source in zip(g_and_v(normalized), parts, strict=True):
            target.copy_(like(target, source))


def like(target: Tensor, whole: Tensor) -> Tensor:
    """Shard a whole tensor as another one is sharded, if it is."""
    if isinstance(target, DTensor) and not isinstance(whole, DTensor):
        return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    return whole


def _computed(name: str) -> property:
    def get(module: nn.Module) -> Tensor:
        # this is read at every call of every layer: the shortest way first, and no attributes of modules
        compiling = torch.compiler.is_compiling()
        weights = None if compiling else kept(module)
        if weights is not None and (weight := weights.get(name)) is not None:
            return weight
        if not compiling and _being_initialized and id(module) in _being_initialized:
            return _being_initialized[id(module)][name]
        normalized: Any = module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        if compiling:
            return cast(Tensor, normalized())
        weight = _compute(normalized)
        if weights is not None:
            weights[name] = weight
        return weight

    def assign(module: nn.Module, value: Tensor) -> None:
        forget(module)
        cast(Any, module.parametrizations)[name].right_inverse(value)

    return property(get, assign)


def _compute(normalized: Any) -> Tensor:
    modules, parameters = normalized._modules, normalized._parameters
    g, v = parameters.get("original0"), parameters.get("original1")
    if len(modules) > 1 or g is None or v is None:
        return cast(Tensor, normalized())
    # past the calls of two modules, which would take as long as the computation
    return cast(Tensor, modules["0"].forward(g, v))


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert type or device, as ``nn.Module._apply`` does."""
    forget(self)
    return cast(nn.Module, plain_class(self)._apply(self, fn, recurse))


def _reset_parameters(self: nn.Module) -> None:
    """Let the plain class initialize plain weights, and take g and v from these."""
    forget(self)
    normalized = normalized_weights(self)
    weights: dict[str, Tensor] = {
        name: nn.Parameter(torch.empty_like(g_and_v(weight)[1]), requires_grad=False)
        for name, weight in normalized.items()
    }
    ordered: dict[str, Any] = in_order(self, {**self._parameters, **weights})
    parametrizations: Any = self._modules["parametrizations"]
    everything = dict(parametrizations._modules)
    _being_initialized[id(self)] = weights
    try:
        # recurrent layers fill all that they find among their parameters, in their order
        for name in normalized:
            del parametrizations._modules[name]
        set_parameters(self, ordered)
        plain_class(self).reset_parameters(self)
    finally:
        del _being_initialized[id(self)]
        for name in normalized:
            self._parameters.pop(name, None)
        parametrizations._modules.clear()
        parametrizations._modules.update(everything)
    for name, weight in normalized.items():
        if not weights[name].is_meta:
            store(weight, weights[name])
            if vars(weight).get("reset_parameters") is not _done_by_owner:
                vars(weight).pop("reset_parameters", None)  # holds the module, which holds the weight


def _done_by_owner() -> None:
    """Leave the initialization of g and v to the module that they belong to."""


def _reduce(self: nn.Module, protocol: object) -> Any:
    """Pickle as the plain class and a state; torch refuses, because its class exists in this process only."""
    plain = plain_class(self)
    normalized = normalized_weights(self)
    others = sorted(set(cast(Any, self.parametrizations)) - set(normalized))
    if others:
        raise RuntimeError(
            f"{plain.__name__} cannot be pickled, because it has other parametrizations than weight "
            f"normalization, of {some(others)}: save its `state_dict()`, or remove them first with "
            "`torch.nn.utils.parametrize.remove_parametrizations`."
        )
    if any(map(is_sharded, normalized.values())):
        raise RuntimeError(f"{plain.__name__} cannot be pickled while it is sharded: save its `state_dict()`.")
    # what the plain class leaves out, such as the weak references of a recurrent layer; torch's class refuses
    state = plain.__getstate__(self) if hasattr(plain, "__getstate__") else self.__dict__
    return _rebuild, (plain, tuple(normalized)), dict(state)


def _rebuild(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls: type[nn.Module] = type(f"Parametrized{plain.__name__}", (plain,), {})
    for name in names:
        _equip(cls, name)
    if issubclass(plain, nn.RNNBase):
        follow_in_class(cls)
    return nn.Module.__new__(cls)
