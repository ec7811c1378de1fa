"""How the learning rate goes with the batch size: rules, and which of them fits an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch.optim import Optimizer

from lightning_wn.batch_size.tradeoff import steps_factor

OptimizerFamily = Literal["sgd", "adam"]

_SGD_LIKE = {"SGD", "ASGD", "LARS"}
# they divide by a root of squared gradients, which noise dominates at small batches
_ADAM_LIKE = {"Adagrad", "Adadelta", "Adafactor", "RMSprop", "LAMB", "Lamb"}


def optimizer_family(optimizer: Optimizer) -> OptimizerFamily | None:
    """Return whether the optimizer is like SGD or like Adam; None where it is like neither, as LBFGS or Lion.

    Known are torch's own classes and what derives from them, everything with Adam in its name, and what keeps Adam's
    second moment.
    """
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if any("adam" in name.lower() for name in names) or names & _ADAM_LIKE:
        return "adam"
    if names & _SGD_LIKE:
        return "sgd"
    return "adam" if any("exp_avg_sq" in state for state in optimizer.state.values()) else None


LearningRateRule = Literal["sqrt", "linear", "sgd", "adam", "none"]
BY_NOISE_SCALE = frozenset({"sgd", "adam"})
"""The rules that go by the noise scale."""
LEARNING_RATE_RULES: dict[str, Callable[[float, float, float], float]] = {
    "sqrt": lambda old, new, noise_scale: math.sqrt(new / old),
    "linear": lambda old, new, noise_scale: new / old,
    "sgd": lambda old, new, noise_scale: 1.0 / steps_factor(old, new, noise_scale),
    "adam": lambda old, new, noise_scale: math.sqrt(1.0 / steps_factor(old, new, noise_scale)),
    "none": lambda old, new, noise_scale: 1.0,
}


def learning_rate_factor(rule: LearningRateRule, old: float, new: float, noise_scale: float) -> float:
    """Return the factor on the learning rate from batch size ``old`` to ``new``.

    Args:
        rule: ``"sqrt"``: the root of the ratio of batch sizes. ``"linear"``: the ratio. ``"sgd"``: by the
            noise scale N, as the optimal step ε(B) = ε_max / (1 + N/B) (arXiv 1812.06162, section 2.2): linear far
            below N and 1 far above it, so that it grows as the steps shrink. ``"adam"``: the root of that, as Adam
            divides by the root of the second moment, which noise dominates at small batches. ``"none"``: 1.
        old: The batch size that the learning rate was chosen for.
        new: Another one, in the same unit.
        noise_scale: The noise scale in that unit, for ``"sgd"`` and ``"adam"``.
    """
    return LEARNING_RATE_RULES[rule](old, new, noise_scale)


def check_learning_rate_rule(rule: str) -> None:
    """Raise ValueError for an unknown rule."""
    if rule not in LEARNING_RATE_RULES:
        raise ValueError(f"`learning_rate` must be one of {list(LEARNING_RATE_RULES)}, got {rule!r}.")
