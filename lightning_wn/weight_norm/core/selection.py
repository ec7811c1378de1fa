"""Which modules of a model are meant: by type, by glob on qualified names, or by a predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations

from lightning_wn.module_selectors import (
    ALLOWED_SELECTORS,
    ModuleSelection,
    ModuleSelector,
    as_selectors,
    matcher,
    show_selection,
)
from lightning_wn.text import some
from lightning_wn.weight_norm.core.layers import DEFAULT_TYPES, rule_for, supported_names
from lightning_wn.weight_norm.core.normalized_module import normalized_weights, plain_class


@dataclass(frozen=True)
class NamedLayer:
    """A module that owns a weight, under every qualified name that it has in the model."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def __str__(self) -> str:
        """Say the name and the type, for error messages."""
        known = plain_class if normalized_weights(self.module) else type_before_parametrizations
        kind = known(self.module).__name__
        return f"{self.name!r} ({kind})" if self.name else kind


@dataclass(frozen=True)
class Selection:
    """The selected layers, all of supported types, and what was asked for in vain.

    Attributes:
        layers: In the order of the model.
        misses: One sentence for each entry of ``modules`` or ``exclude`` that matches no layer.
    """

    layers: tuple[NamedLayer, ...]
    misses: tuple[str, ...]


def select(root: nn.Module, modules: ModuleSelection | None, exclude: ModuleSelection) -> Selection:
    """Find the layers of a model that ``modules`` names and ``exclude`` does not.

    What is matched are the modules that own a weight: those of a supported type and those that hold a matrix
    of their own. Containers, activations and normalization layers under a matching name are passed over.

    Args:
        root: The model.
        modules: See :func:`~lightning_wn.weight_norm.apply_weight_norm`.
        exclude: The same kinds of entries; what they match is left alone.

    Raises:
        TypeError: If an entry is of a wrong type.
        ValueError: If a matrix is selected in a module of an unsupported type.
    """
    candidates = list(_weight_owners(root))
    misses: list[str] = []
    if modules is None:
        chosen = {id(layer.module) for layer in candidates if isinstance(layer.module, DEFAULT_TYPES)}
        if not chosen:
            names = ", ".join(cls.__name__ for cls in DEFAULT_TYPES)
            misses.append(
                f"`modules=None` found no layer to normalize in {type(root).__name__}: it means the types "
                f"{names}, so name what you want normalized in `modules`."
            )
    else:
        chosen = _matching("modules", as_selectors("modules", modules), root, candidates, misses)
    excluded = _matching("exclude", as_selectors("exclude", exclude), root, candidates, misses)
    chosen -= excluded
    for layer in candidates:
        if id(layer.module) in chosen and (rule := rule_for(layer.module)) is not None:
            chosen |= {id(part) for part in rule.parts(layer.module)}
    selected = [layer for layer in candidates if id(layer.module) in chosen - excluded]
    if unsupported := [layer for layer in selected if rule_for(layer.module) is None]:
        raise ValueError(
            f"`modules={show_selection(modules)}` selects {some(unsupported)}, but only modules of the types "
            f"{supported_names()} can be weight-normalized: narrow `modules`, or add this name to `exclude`."
        )
    return Selection(tuple(selected), tuple(misses))


def _weight_owners(root: nn.Module) -> Iterator[NamedLayer]:
    owners: dict[int, tuple[nn.Module, list[str]]] = {}
    inside: list[str] = []  # what computes an already parametrized tensor is not a layer of the model
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, ParametrizationList):
            inside.append(name + ".")
        elif not name.startswith(tuple(inside)) and (rule_for(module) is not None or (name and _owns_matrix(module))):
            owners.setdefault(id(module), (module, []))[1].append(name)
    for module, names in owners.values():
        yield NamedLayer(tuple(names), module)


def _owns_matrix(module: nn.Module) -> bool:
    return any(is_lazy(p) or p.ndim >= 2 for p in module.parameters(recurse=False))


def _matching(
    argument: str,
    entries: Sequence[ModuleSelector],
    root: nn.Module,
    candidates: Sequence[NamedLayer],
    misses: list[str],
) -> set[int]:
    if argument == "modules" and not entries:
        misses.append(f"`modules=()` selects nothing: pass None for the default types, or {ALLOWED_SELECTORS}.")
    hits: set[int] = set()
    for entry in entries:
        matches = matcher(entry)
        found = {id(layer.module) for layer in candidates if any(matches(n, layer.module) for n in layer.names)}
        if not found:
            misses.append(_miss(argument, entry, root, matches))
        hits |= found
    return hits


def _miss(argument: str, entry: ModuleSelector, root: nn.Module, matches: Callable[[str, nn.Module], bool]) -> str:
    where = type(root).__name__
    others = [f"{name!r} ({type(module).__name__})" for name, module in root.named_modules() if matches(name, module)]
    if not others:
        return (
            f"`{argument}={show_selection(entry)}` matches no module of {where}: an entry must be {ALLOWED_SELECTORS}; "
            "correct it or leave it out."
        )
    inner = f'; to mean the layers inside a module, write "{entry}.*"' if isinstance(entry, str) else ""
    return (
        f"`{argument}={show_selection(entry)}` matches {some(others)} in {where}, and none of these owns a weight that "
        f"could be normalized: only modules of the types {supported_names()} can{inner}."
    )
