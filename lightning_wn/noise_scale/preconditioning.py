"""The diagonal that an Adam-like optimizer divides its gradients by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_wn.summing import summing_dtype

Denominator = Callable[[nn.Parameter], Tensor | None]
"""What the optimizer divides each element of a parameter's gradient by, None before it has any state."""

_SECOND_MOMENT = "exp_avg_sq"
_WITHOUT_SECOND_MOMENT = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.LBFGS,
    torch.optim.Rprop,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.RMSprop,
)


def divide(gradient: Tensor, denominator: Tensor) -> Tensor:
    """Divide element by element; of complex tensors, each part by its own."""
    if not gradient.is_complex():
        return gradient / denominator.to(gradient.dtype)
    if not denominator.is_complex():
        return gradient / denominator
    parts = torch.view_as_real(gradient.resolve_conj()), torch.view_as_real(denominator)
    return torch.view_as_complex(parts[0] / parts[1].to(parts[0].dtype))


class AdamDenominator:
    """√v̂ + ε for each parameter, as Adam, AdamW and their kin keep it (Kingma & Ba, arXiv 1412.6980, algorithm 1).

    With P = diag(1 / (√v̂ + ε)) the preconditioned gradient Pg is what such an optimizer follows, and |PG|² and
    tr(PΣP) are its noise scale (Qiao et al., Pollux, OSDI 2021, section 3.1). v̂ is that of the steps before, so it does
    not depend on the gradient that is measured.

    Args:
        optimizer: An optimizer that keeps ``exp_avg_sq``.

    Raises:
        ValueError: If the optimizer is of a class that keeps no such moment.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, _WITHOUT_SECOND_MOMENT):
            raise _no_second_moment(optimizer)
        self._optimizer = optimizer
        self._groups: dict[int, dict[str, Any]] = {}

    def __call__(self, parameter: nn.Parameter) -> Tensor | None:
        """Return √v̂ + ε in the parameter's shape, or None before the optimizer's first step.

        Raises:
            ValueError: If after its first step the optimizer keeps no ``exp_avg_sq``.
        """
        state = self._optimizer.state.get(parameter)
        if not state:
            return None
        group = self._group(parameter)
        if _SECOND_MOMENT not in state or "step" not in state or "betas" not in group or "eps" not in group:
            raise _no_second_moment(self._optimizer)
        second: Tensor = state.get("max_exp_avg_sq", state[_SECOND_MOMENT])
        step = torch.as_tensor(state["step"])
        dtype = summing_dtype(step.device)
        # a power near one, subtracted from one: float32 would lose digits
        correction = 1.0 - torch.as_tensor(group["betas"][1], device=step.device, dtype=dtype) ** step.to(dtype)
        if second.is_complex():  # one moment for each part
            parts = torch.view_as_real(second)
            return torch.view_as_complex((parts / correction.to(parts)).sqrt_().add_(group["eps"]))
        return (second / correction.to(second)).sqrt_().add_(group["eps"])

    def _group(self, parameter: nn.Parameter) -> dict[str, Any]:
        if id(parameter) not in self._groups:
            self._groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        return self._groups[id(parameter)]


def _no_second_moment(optimizer: Optimizer) -> ValueError:
    return ValueError(
        f"`preconditioned=True` needs an optimizer that divides by a running second moment, and "
        f"{type(optimizer).__name__} keeps no `{_SECOND_MOMENT}`; use Adam, AdamW, NAdam or RAdam, or "
        "`preconditioned=False`."
    )
