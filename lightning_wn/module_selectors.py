"""How users name modules: by type, by glob on qualified names, or by a predicate."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import nn

ModuleSelector: TypeAlias = type[nn.Module] | str | Callable[[str, nn.Module], bool]
# the order matters to jsonargparse: behind a Callable it can no longer write out a list or a string
ModuleSelection: TypeAlias = Sequence[ModuleSelector] | ModuleSelector

ALLOWED_SELECTORS = (
    'a type such as `nn.Linear` or "torch.nn.Linear", a glob on qualified names such as "encoder.*", '
    "a predicate (name, module) -> bool, or a list of these"
)
"""What an entry may be, for error messages."""


def as_selectors(argument: str, value: ModuleSelection) -> tuple[ModuleSelector, ...]:
    """Check an argument that names modules and return its entries.

    Args:
        argument: The argument's name for the error.
        value: One entry or a sequence of them.

    Raises:
        TypeError: If an entry is none of what is allowed.
    """
    entries = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for entry in entries:
        is_other_type = isinstance(entry, type) and not issubclass(entry, nn.Module)
        if is_other_type or not (isinstance(entry, str) or callable(entry)) or isinstance(entry, nn.Module):
            raise TypeError(f"`{argument}` got {entry!r}, but each entry must be {ALLOWED_SELECTORS}.")
    return entries


def matcher(entry: ModuleSelector) -> Callable[[str, nn.Module], bool]:
    """Return the predicate (name, module) -> bool that an entry stands for."""
    if isinstance(entry, str):
        named_type = _imported_type(entry)
        if named_type is None:
            pattern = entry
            return lambda name, module: fnmatch.fnmatchcase(name, pattern)
        entry = named_type
    if isinstance(entry, type):
        wanted = entry
        return lambda name, module: isinstance(module, wanted)
    return entry


def show_selection(selection: ModuleSelection | None) -> str:
    """Write a selection out as its user would, for error messages."""
    if isinstance(selection, type):
        return selection.__qualname__
    if isinstance(selection, str) or selection is None or not isinstance(selection, Sequence):
        return repr(selection)
    return "[" + ", ".join(show_selection(entry) for entry in selection) + "]"


def _imported_type(path: str) -> type[nn.Module] | None:
    """Return the module class of this dotted path if it is imported already; never import for a name."""
    package, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(package), name, None) if package else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
