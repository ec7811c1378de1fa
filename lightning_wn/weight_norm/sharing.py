"""Parameters that several modules own: they stay one Parameter, or the rewriting is refused."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from lightning_wn.text import some
from lightning_wn.weight_norm.core.layers import rule_for
from lightning_wn.weight_norm.core.selection import NamedLayer


class _Owner(NamedTuple):
    name: str
    module: nn.Module
    is_rewritten: bool


def require_owners_alike(root: nn.Module, weights: Iterable[tuple[NamedLayer, str]]) -> None:
    """Raise unless every weight to rewrite is owned by layers that are all rewritten alike.

    Args:
        root: The model in which owners are looked for.
        weights: The layers with the names of those of their tensors that are about to be replaced.

    Raises:
        ValueError: If a weight has an owner that keeps the plain one, or owners whose units differ, or shares
            its memory with another Parameter.
    """
    rewritten = {(id(layer.module), name): getattr(layer.module, name) for layer, name in weights}
    owners: dict[int, list[_Owner]] = {}
    for module_name, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            qualified = f"{module_name}.{name}" if module_name else name
            is_rewritten = (id(module), name) in rewritten
            owners.setdefault(id(parameter), []).append(_Owner(qualified, module, is_rewritten))

    for weight in rewritten.values():
        shared = owners[id(weight)]
        plain = [repr(owner.name) for owner in shared if not owner.is_rewritten]
        names = some(repr(owner.name) for owner in shared)
        if plain:
            raise ValueError(
                f"{names} are one shared Parameter, but {some(plain)} would not be "
                "weight-normalized: select all modules that share it (an Embedding has to be named in "
                "`modules`) or exclude all of them."
            )
        rules = [(owner.module, rule_for(owner.module)) for owner in shared]
        if len({rule.layout(module) if rule is not None else None for module, rule in rules}) > 1:
            raise ValueError(
                f"{names} are one shared Parameter, but their output units lie on different dimensions of "
                "it, so that one g cannot serve them: exclude all of them."
            )
    _require_memory_apart(root, {id(weight) for weight in rewritten.values()})


def _require_memory_apart(root: nn.Module, rewritten: set[int]) -> None:
    """Refuse two Parameters over the same memory: new g and v would silently untie them."""
    spans = sorted(
        (str(parameter.device), *_span(parameter), name, id(parameter) in rewritten)
        for name, parameter in root.named_parameters()
        if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel()
    )
    for (device, _, end, name, first), (other_device, start, _, other, second) in pairwise(spans):
        if device == other_device and start < end and (first or second):
            raise ValueError(
                f"{name!r} and {other!r} share memory without being one Parameter, and rewriting one would "
                "silently untie them: assign the same Parameter to both modules, or exclude them."
            )


def _span(parameter: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    start = parameter.data_ptr()
    return start, start + (last + 1) * parameter.element_size()
