"""Whether an optimizer is like SGD or like Adam, which says how its learning rate goes with the batch size."""

from __future__ import annotations

import math
from typing import Literal, get_args

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

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(1))]
        >>> optimizer_family(torch.optim.SGD(weights)), optimizer_family(torch.optim.AdamW(weights))
        ('sgd', 'adam')
        >>> optimizer_family(torch.optim.LBFGS(weights)) is None
        True
    """
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if any("adam" in name.lower() for name in names) or names & _ADAM_LIKE:
        return "adam"
    if names & _SGD_LIKE:
        return "sgd"
    return "adam" if any("exp_avg_sq" in state for state in optimizer.state.values()) else None


def sgd_learning_rate_factor(old: float, new: float, critical_batch_size: float) -> float:
    """Return the factor on SGD's learning rate from batch size ``old`` to ``new``.

    The optimal step is ε(B) = ε_max / (1 + B_crit/B) (arXiv 1812.06162, section 2.2): proportional to B
    far below the critical batch size, constant far above it. So it grows as the steps shrink.

    Example:
        >>> sgd_learning_rate_factor(32, 128, 128)
        2.5
    """
    return 1.0 / steps_factor(old, new, critical_batch_size)


def adam_learning_rate_factor(old: float, new: float, critical_batch_size: float) -> float:
    """Return the factor on an Adam-like optimizer's learning rate: the square root of SGD's.

    Adam divides by the root of the second moment, which noise dominates at small batches: the
    square-root rule.

    Example:
        >>> round(adam_learning_rate_factor(32, 128, 128), 2)
        1.58
    """
    return math.sqrt(sgd_learning_rate_factor(old, new, critical_batch_size))


LearningRateRule = Literal["sqrt", "linear", "sgd", "adam", "none"]


def learning_rate_factor(rule: LearningRateRule, old: float, new: float, noise_scale: float) -> float:
    """Return the factor on the learning rate from batch size ``old`` to ``new``.

    Args:
        rule: ``"sqrt"``: the root of the ratio of batch sizes. ``"linear"``: the ratio. ``"sgd"`` and ``"adam"``: by
            the noise scale (arXiv 1812.06162, section 2.2), which is linear (the root) far below it and 1 far above
            it. ``"none"``: 1.
        old: The batch size that the learning rate was chosen for.
        new: Another one, in the same unit.
        noise_scale: The noise scale in that unit, for ``"sgd"`` and ``"adam"``.

    Example:
        >>> [learning_rate_factor(rule, 32, 128, 128) for rule in ("sqrt", "linear", "sgd", "none")]
        [2.0, 4.0, 2.5, 1.0]
    """
    if rule == "sgd":
        return sgd_learning_rate_factor(old, new, noise_scale)
    if rule == "adam":
        return adam_learning_rate_factor(old, new, noise_scale)
    power = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}[rule]
    return float((new / old) ** power)


def needs_noise_scale(rule: LearningRateRule) -> bool:
    """Whether the rule goes by the noise scale.

    Example:
        >>> needs_noise_scale("adam"), needs_noise_scale("sqrt")
        (True, False)
    """
    return rule in ("sgd", "adam")


def check_learning_rate_rule(rule: str) -> None:
    """Raise ValueError for an unknown rule."""
    if rule not in get_args(LearningRateRule):
        raise ValueError(f"`learning_rate` must be one of {list(get_args(LearningRateRule))}, got {rule!r}.")
