"""Steps against examples: what a batch size costs, given the critical batch size.

McCandlish et al., arXiv 1812.06162, section 2.3: training to the same loss with batch size B takes
S = S_min (1 + B_crit/B) optimizer steps and E = E_min (1 + B/B_crit) examples. The noise scale predicts
B_crit, where both cost twice their minimum.
"""

from __future__ import annotations

import math


def steps_cost(batch_size: float, critical_batch_size: float) -> float:
    """Return S/S_min = 1 + B_crit/B, optimizer steps over the fewest possible.

    Args:
        batch_size: B, positive.
        critical_batch_size: B_crit in the same unit, from 0 to infinity.

    Example:
        >>> steps_cost(32, 128)
        5.0
    """
    return 1.0 + critical_batch_size / batch_size


def examples_cost(batch_size: float, critical_batch_size: float) -> float:
    """Return E/E_min = 1 + B/B_crit, examples over the fewest possible.

    Args:
        batch_size: B, positive.
        critical_batch_size: B_crit in the same unit, from 0 to infinity.

    Example:
        >>> examples_cost(32, 128)
        1.25
    """
    if critical_batch_size == 0:
        return math.inf
    return 1.0 + batch_size / critical_batch_size


def steps_factor(old: float, new: float, critical_batch_size: float) -> float:
    """Return the steps to the same loss at batch size ``new``, over those at ``old``.

    Example:
        >>> steps_factor(32, 128, 128)
        0.4
    """
    return examples_factor(old, new, critical_batch_size) * old / new


def examples_factor(old: float, new: float, critical_batch_size: float) -> float:
    """Return the examples to the same loss at batch size ``new``, over those at ``old``.

    Written so that the limits hold: new/old where B_crit is 0, and 1 where it is infinite.

    Example:
        >>> examples_factor(32, 128, 128), examples_factor(32, 128, 0), examples_factor(32, 128, math.inf)
        (1.6, 4.0, 1.0)
    """
    if math.isinf(critical_batch_size):
        return 1.0
    return (critical_batch_size + new) / (critical_batch_size + old)


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
