"""What weight normalization does to learning, in numbers: the effective learning rate, g, and the growth of ‖v‖."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from lightning_wn.trainer import is_log_step, log_interval, log_metrics, step_to_log
from lightning_wn.weight_norm.checkpoint.exact_resume import KEY
from lightning_wn.weight_norm.core.normalized_module import g_and_v, named_normalized_weights, weight_norm_in
from lightning_wn.weight_norm.core.parametrization import unit_norm


def mean_norms(module: nn.Module) -> dict[str, float]:
    """Return the mean of ‖v‖ over the units of each normalized weight, by the weight's name."""
    return {name: float(_norms(normalized).mean()) for name, normalized in named_normalized_weights(module)}


@torch.no_grad()
def learning_signals(
    module: nn.Module, optimizers: Iterable[Optimizer], start: Mapping[str, float], *, per_layer: bool = False
) -> dict[str, float]:
    """Return the numbers to log.

    The direction v/‖v‖ of a unit moves under plain gradient descent as if the learning rate were η/‖v‖²,
    because the gradient by v is orthogonal to v and shrinks with ‖v‖; for the same reason ‖v‖ only grows
    (Salimans & Kingma, arXiv 1602.07868, section 2.1).

    Args:
        module: The model.
        optimizers: Those whose learning rates count.
        start: The mean ‖v‖ of each weight when training began, as of :func:`mean_norms`.
        per_layer: Whether to return the numbers of each weight too, with its name behind a slash.

    Returns:
        ``effective_lr_median``, ``_min`` and ``_max`` (of η/‖v‖², over all units; absent where no optimizer
        holds a v), ``g_mean``, ``g_std``, ``g_min``, ``g_max`` (over all units), ``v_growth`` (‖v‖ over its
        start, the mean over layers).
    """
    rates = {id(p): float(group["lr"]) for opt in optimizers for group in opt.param_groups for p in group["params"]}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, normalized in named_normalized_weights(module):
        g, v = g_and_v(normalized)
        norms = _norms(normalized)
        parts[name] = {"g": g.detach().float().flatten(), "growth": norms.mean() / start.get(name, float("nan"))}
        if id(v) in rates:
            parts[name]["rate"] = rates[id(v)] / norms.square()
    if not parts:
        return {}
    values = _summary(list(parts.values()))
    if per_layer:
        for name, numbers in parts.items():
            values |= {f"{key}/{name}": value for key, value in _summary([numbers]).items()}
    return values


def _summary(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    g = torch.cat([part["g"] for part in parts])
    numbers = {
        "g_mean": g.mean(),
        "g_std": g.std(unbiased=False),
        "g_min": g.min(),
        "g_max": g.max(),
        "v_growth": torch.stack([part["growth"] for part in parts]).mean(),
    }
    if rates := [part["rate"] for part in parts if "rate" in part]:
        rate = torch.cat(rates)
        numbers |= {f"effective_lr_{kind}": getattr(rate, kind)() for kind in ("median", "min", "max")}
    # one transfer from the device for all
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def _norms(normalized: ParametrizationList) -> Tensor:
    return unit_norm(g_and_v(normalized)[1].detach(), weight_norm_in(normalized).layout).float().flatten()


class SignalLog:
    """Logs :func:`learning_signals` where the Trainer logs the model's own numbers, and by the same means.

    Args:
        per_layer: Whether to log every layer, too.
    """

    def __init__(self, *, per_layer: bool) -> None:
        self._per_layer = per_layer
        self._start: dict[str, float] = {}

    def start(self, pl_module: nn.Module) -> None:
        """Remember ‖v‖ as it is now."""
        self._start = mean_norms(pl_module)

    def log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log after a batch, if the Trainer does: at log steps, once a window, and where it is told to stop."""
        if not log_interval(trainer) or trainer.fit_loop._should_accumulate():
            return
        if is_log_step(trainer) or trainer.should_stop:
            values = learning_signals(pl_module, trainer.optimizers, self._start, per_layer=self._per_layer)
            log_metrics(trainer, {f"weight_norm/{key}": value for key, value in values.items()}, step_to_log(trainer))

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the start of ‖v‖ into a checkpoint."""
        checkpoint[f"{KEY}_start"] = dict(self._start)

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the start of ‖v‖ from a checkpoint, if it is there."""
        self._start |= checkpoint.get(f"{KEY}_start", {})
