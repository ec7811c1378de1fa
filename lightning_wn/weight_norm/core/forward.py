"""A module's forward method, past the hooks of its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lightning_wn.weight_norm.core.torch_weight_norm import legacy_hooks


def call_forward(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    tied: bool = True,
) -> Any:
    """Call ``module.forward`` with other tensors in the place of some of its own, without the hooks of its calls.

    Args:
        module: The module.
        tensors: Parameters and buffers by their names in it.
        args: Its arguments.
        kwargs: Its keyword arguments.
        tied: Whether other names of the same tensor get the new one, too.
    """
    own = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_WithoutHooks(module), own, tuple(args), dict(kwargs), tie_weights=tied)


class _WithoutHooks(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # torch's older weight normalization is a hook, and keeps the computed weight as a plain attribute
        hooks = legacy_hooks(self.module)
        before = {name: getattr(self.module, name) for name in hooks}
        try:
            for name, hook in hooks.items():
                setattr(self.module, name, hook.compute_weight(self.module))
            return self.module.forward(*args, **kwargs)
        finally:
            for name, weight in before.items():
                setattr(self.module, name, weight)
