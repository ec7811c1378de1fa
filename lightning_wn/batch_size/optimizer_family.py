"""Whether an optimizer is like SGD or like Adam, which says how its learning rate goes with the batch size."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer

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
