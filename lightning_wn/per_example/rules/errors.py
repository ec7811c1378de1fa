"""What has no exact per-example gradient here: one sentence each, with the fix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_wn.text import some
from lightning_wn.weight_norm.core.mean_only_batch_norm import MeanOnlyBatchNorm


class PerExampleError(RuntimeError):
    """Exact per-example gradients cannot be had; the message names the module and the fix."""


class MixedExamplesError(PerExampleError):
    """Examples mix, so that none has a gradient of its own, in this step or in any."""


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


def can_have_examples(model: nn.Module) -> bool:
    """Return whether nothing in the model as a whole keeps examples from having gradients of their own."""
    try:
        require_separate_examples(model)
    except PerExampleError:
        return False
    return True


def require_separate_examples(model: nn.Module) -> None:
    """Raise for a model that as a whole has no exact per-example gradients.

    Raises:
        PerExampleError: If a layer mixes examples, or a part is compiled or scripted.
    """
    if mixing := batch_dependent_layers(model):
        raise PerExampleError(
            f"{_several('layer', mixing)} {'makes' if len(mixing) == 1 else 'make'} use of batch statistics, which "
            "leave no example a gradient of its own: use GroupNorm or LayerNorm there, put the layer into eval(), or "
            "choose probe='batch_pair'"
        )
    named = list(model.named_modules())
    if compiled := [name or type(model).__name__ for name, module in named if _is_compiled(module)]:
        raise PerExampleError(
            f"{_several('module', compiled)} {'is' if len(compiled) == 1 else 'are'} compiled, and hooks added to a "
            "compiled module are ignored: measure without torch.compile, or choose another probe"
        )
    if scripted := [name for name, module in named if isinstance(module, torch.jit.ScriptModule)]:
        raise PerExampleError(
            f"{_several('module', scripted)} {'is' if len(scripted) == 1 else 'are'} scripted and cannot be measured: "
            "use the eager module, or choose another probe"
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether hooks put on the module or below it now would be ignored."""
    wrapped = type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def _several(kind: str, names: list[str]) -> str:
    return f"{kind}{'s' if len(names) > 1 else ''} {some(map(repr, names))}"


def require_batch_dimension(module: nn.Module, x: Tensor, dims: int) -> None:
    """Raise PerExampleError unless a layer's input has so many dimensions, the batch's included."""
    if x.ndim < dims:
        raise PerExampleError(
            f"{type(module).__name__} got an input of shape {shape_of(x)} without a batch dimension: add one"
        )


def reached_twice(label: str) -> PerExampleError:
    """Return the error for a second backward pass through one call of a layer."""
    return PerExampleError(
        f"the gradient reached {label} twice: per-example norms need one backward pass through each forward pass, so "
        "call before_forward and after_backward around each, or choose another probe"
    )


def name_of(module: nn.Module, name: str) -> str:
    """Return how a module is called in a message."""
    return f"{name!r} ({type(module).__name__})" if name else type(module).__name__


def shape_of(value: Any) -> str:
    """Return a tensor's shape for a message."""
    return "x".join(str(n) for n in value.shape) or "scalar"
