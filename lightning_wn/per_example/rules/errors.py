"""What has no exact per-example gradient here: one sentence each, with the fix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_wn.weight_norm.core.mean_only_batch_norm import MeanOnlyBatchNorm


class PerExampleError(RuntimeError):
    """Exact per-example gradients cannot be had; the message names the module and the fix."""


def batch_dependent_layers(model: nn.Module) -> list[str]:
    """Name the layers that mix the examples of a batch in the mode that the model is in.

    With one of them no example has a gradient of its own, anywhere in the network. Batch normalization that
    uses its running statistics (``eval()`` with ``track_running_stats``) does not mix, instance
    normalization never does.

    Args:
        model: The model, in training mode as it will be trained.

    Returns:
        Names as of ``model.named_modules()``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.InstanceNorm2d(8))
        >>> batch_dependent_layers(model)
        ['1']
        >>> batch_dependent_layers(model.eval())
        []
    """
    return [name for name, module in model.named_modules() if _mixes_examples(module)]


def _mixes_examples(module: nn.Module) -> bool:
    if isinstance(module, MeanOnlyBatchNorm):
        return module.training
    if not isinstance(module, _NormBase) or isinstance(module, _InstanceNorm):
        return False
    return module.training or (module.running_mean is None and module.running_var is None)


def compiled_modules(model: nn.Module) -> list[str]:
    """Name the modules that are compiled: hooks put on them or below them now would be ignored."""
    compiled: list[str] = []
    for name, module in model.named_modules():
        wrapped = type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")
        if wrapped or getattr(module, "_compiled_call_impl", None) is not None:
            compiled.append(name or type(model).__name__)
    return compiled


def can_have_examples(model: nn.Module) -> bool:
    """Return whether nothing in the model as a whole keeps examples from having gradients of their own."""
    try:
        refuse_model(model)
    except PerExampleError:
        return False
    return True


def refuse_model(model: nn.Module) -> None:
    """Raise for a model that as a whole has no exact per-example gradients.

    Raises:
        PerExampleError: If a layer mixes examples, or a part is compiled or scripted.
    """
    mixing = batch_dependent_layers(model)
    if mixing:
        raise PerExampleError(
            f"{_several('layer', mixing)} of batch statistics, which leave no example a gradient of its own: use "
            "GroupNorm or LayerNorm there, put the layer into eval(), or choose probe='consecutive'"
        )
    compiled = compiled_modules(model)
    if compiled:
        raise PerExampleError(
            f"{_several('module', compiled)} compiled, and hooks added to a compiled module are ignored: measure "
            "without torch.compile, or choose another probe"
        )
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise PerExampleError(
            f"{_several('module', scripted)} scripted and cannot be measured: use the eager module, or choose another "
            "probe"
        )


def _several(kind: str, names: list[str]) -> str:
    listed = ", ".join(repr(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")
    verb = {"layer": ("makes use", "make use"), "module": ("is", "are")}[kind]
    return f"{kind}{'s' if len(names) > 1 else ''} {listed} {verb[len(names) > 1]}"


def name_of(module: nn.Module, name: str) -> str:
    """Return how a module is called in a message."""
    return f"{name!r} ({type(module).__name__})" if name else type(module).__name__


def shape_of(value: Any) -> str:
    """Return a tensor's shape for a message."""
    return "x".join(str(n) for n in value.shape) or "scalar"
