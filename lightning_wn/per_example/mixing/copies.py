"""Copies of a model that compute what it computes, with its random numbers and without calling the user's hooks."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# part of what a module computes: weight normalization, spectral normalization, pruning
_COMPUTE = ("torch.", "lightning_wn.weight_norm")


def fresh_copy(model: nn.Module, copier: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Copy the model without the user's hooks."""
    with _bare(model):
        return copier(model)


def hooked_by_user(model: nn.Module) -> list[str]:
    """Name the modules with forward hooks that a copy is without, and that may change what they compute."""
    return [
        name
        for name, module in model.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not _computes(hook) and not _defined_in(hook).startswith("lightning_wn.")
    ]


@contextlib.contextmanager
def without_global_hooks() -> Iterator[None]:
    """Let no hook see the modules that are called here."""
    kept = {name: getattr(torch_module, name) for name in _GLOBAL_HOOKS}
    try:
        for name in kept:
            setattr(torch_module, name, OrderedDict())
        yield
    finally:
        for name, hooks in kept.items():
            setattr(torch_module, name, hooks)


class RandomState:
    """The random state of Python, numpy and torch, as it is when this is made."""

    def __init__(self) -> None:
        self._devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)  # type: ignore[no-untyped-call]  # torch's
        self._state = self._now()

    def _now(self) -> tuple[Any, ...]:
        numpy: Any = sys.modules.get("numpy.random")
        return (
            random.getstate(),
            None if numpy is None else numpy.get_state(),
            torch.get_rng_state(),
            [torch.cuda.get_rng_state(device) for device in self._devices],
        )

    def _set(self, state: tuple[Any, ...]) -> None:
        of_python, of_numpy, of_cpu, of_devices = state
        random.setstate(of_python)
        if of_numpy is not None:
            sys.modules["numpy.random"].set_state(of_numpy)
        torch.set_rng_state(of_cpu)
        for device, own in zip(self._devices, of_devices, strict=True):
            torch.cuda.set_rng_state(own, device)

    @contextlib.contextmanager
    def replayed(self, *, other: bool = False) -> Iterator[None]:
        """Start from this state, or from another one, and put today's back at the end."""
        today = self._now()
        try:
            self._set(self._state)
            if other:
                # the streams go on elsewhere; nobody else sees it
                seed = int(torch.randint(2**31, ()))
                random.seed(seed)
                if "numpy.random" in sys.modules:
                    sys.modules["numpy.random"].seed(seed)
                torch.manual_seed(seed)
            yield
        finally:
            self._set(today)


def turn_dropout_off(model: nn.Module) -> None:
    """Leave out what is random by design."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0


def _computes(hook: Any) -> bool:
    return _defined_in(hook).startswith(_COMPUTE)


def _defined_in(hook: Any) -> str:
    # a functools.partial is what it calls
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


@contextlib.contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Take away for a moment what is not to be copied, or cannot be.

    That is hooks, which may belong to large objects, and the history of tensors that a module keeps of its last call,
    such as a legacy weight norm's weight.
    """
    kept: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            for name, value in list(vars(module).items()):
                bare = _without_users(value) if name in _HOOKS else _without_history(value)
                if bare is not value:
                    kept.append((module, name, value))
                    vars(module)[name] = bare
        yield
    finally:
        for module, name, value in kept:
            vars(module)[name] = value


def _without_users(hooks: Any) -> Any:
    own = OrderedDict((key, hook) for key, hook in hooks.items() if _computes(hook))
    return hooks if len(own) == len(hooks) else own


def _without_history(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value
