"""What ``GradientNoiseScaleCallback`` refuses before it has seen a Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from lightning_wn.arguments import is_between, is_whole
from lightning_wn.callbacks.noise_scale.curvature_measurement import CURVATURE
from lightning_wn.callbacks.noise_scale.optimizer_measurement import PRECONDITIONED, LossMeanOver
from lightning_wn.module_selectors import as_selectors
from lightning_wn.noise_scale.metric import check_ema_decay
from lightning_wn.probes.choice import PROBES

DEFAULT_EMA_DECAY = 0.99


def check_cadence(probe: str, every_n_steps: object, ema_decay: float, half_life_steps: float | None) -> None:
    """Raise ValueError for a probe, a cadence or a memory that there is not."""
    if probe != "auto" and probe not in PROBES:
        raise ValueError(f"`probe` must be one of {['auto', *PROBES]}, got {probe!r}; 'auto' chooses.")
    _check_steps("every_n_steps", every_n_steps, "None measures one step in 10")
    check_ema_decay(ema_decay)
    if half_life_steps is not None:
        # an infinite one forgets nothing
        if not (is_between(half_life_steps, 0.0) or half_life_steps == math.inf):
            raise ValueError(
                f"`half_life_steps` must be a positive number of optimizer steps, got {half_life_steps!r}."
            )
        if ema_decay != DEFAULT_EMA_DECAY:
            raise ValueError(
                f"`ema_decay={ema_decay!r}` and `half_life_steps={half_life_steps!r}` say the same thing twice; "
                "give one of them."
            )


def check_choice(layers: Any, groups: Any, curvature_every_n_steps: object, loss_mean_over: object) -> None:
    """Raise ValueError for parameters that cannot be named so, and for what of a step cannot be measured so."""
    _check_loss_mean_over(loss_mean_over)
    if layers is not None:
        as_selectors("layers", layers)
    for name, selection in (groups or {}).items():
        if not isinstance(name, str) or not name or "/" in name or name in ("total", PRECONDITIONED, CURVATURE):
            raise ValueError(
                f"`groups` must have names that can stand in a logged key, got {name!r}; choose another than 'total', "
                f"'{PRECONDITIONED}' and '{CURVATURE}', without a slash."
            )
        as_selectors(f"groups[{name!r}]", selection)
    _check_steps("curvature_every_n_steps", curvature_every_n_steps, "1000 adds about 1 % to training time")


def check_batch_dims(batch_dims: Mapping[str, object] | None) -> None:
    """Raise ValueError for a dimension that there is not."""
    for name, dim in (batch_dims or {}).items():
        if dim != "folded" and not is_whole(dim, 0):
            raise ValueError(
                f"`batch_dims[{name!r}]` must be a dimension, 0 or more, or 'folded', got {dim!r}; 1 is that of a "
                "sequence-first batch."
            )


def _check_loss_mean_over(loss_mean_over: object) -> None:
    """Raise ValueError for anything but what a loss may be divided by."""
    known = get_args(LossMeanOver)
    if loss_mean_over not in known:
        raise ValueError(
            f"`loss_mean_over` must be one of {list(known)}, got {loss_mean_over!r}; 'micro_batch' is a mean over each "
            "micro-batch, 'window' a sum over the micro-batch divided by the count of the whole window."
        )


def _check_steps(name: str, value: object, hint: str) -> None:
    if value is not None and not is_whole(value):
        raise ValueError(f"`{name}` must be a positive whole number of optimizer steps or None, got {value!r}; {hint}.")
