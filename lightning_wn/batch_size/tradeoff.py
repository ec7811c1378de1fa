"""Steps against examples: what a batch size costs, given the critical batch size.

McCandlish et al., arXiv 1812.06162, section 2.3: training to the same loss with batch size B takes
S = S_min (1 + B_crit/B) optimizer steps and E = E_min (1 + B/B_crit) examples. The noise scale predicts
B_crit, where both cost twice their minimum. B is positive, and B_crit, in the same unit, from 0 to infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lightning_wn.arguments import is_between


@dataclass(frozen=True)
class Factor:
    """A factor that follows from the noise scale, with what the noise scale's interval makes of it.

    Attributes:
        value: At the noise scale itself.
        lower: The smaller of its values at the two ends of the interval.
        upper: The larger of them.
    """

    value: float
    lower: float
    upper: float

    def scaled(self, factor: float) -> Factor:
        """Return all three times a positive number."""
        return Factor(self.value * factor, self.lower * factor, self.upper * factor)

    def __str__(self) -> str:
        """Write it for people, with its interval.

        Example:
            >>> print(Factor(0.4, 0.25, 0.625))
            x0.4 (0.25 to 0.62)
        """
        return f"x{self.value:.2g} ({self.lower:.2g} to {self.upper:.2g})"


def carry_interval(rule: Callable[[float], float], noise_scale: float, lower: float, upper: float) -> Factor:
    """Carry the interval of the noise scale through a rule that rises or falls with it all the way.

    Every factor here is monotone in B_crit at fixed batch sizes, so that the ends of the interval go over into
    the ends of the factor's interval, at the same confidence.

    Args:
        rule: From B_crit to a factor, monotone.
        noise_scale: The estimate of B_crit.
        lower: Lower end of its interval, from 0.
        upper: Upper end, up to infinity.
    """
    ends = sorted((rule(lower), rule(upper)))
    return Factor(rule(noise_scale), *ends)


def check_target(target: float) -> None:
    """Raise ValueError unless the target θ is a positive number."""
    if not is_between(target, 0.0):
        raise ValueError(
            f"`target` must be a positive number, got {target!r}; it is the wished batch size over the noise scale: "
            "1 costs twice the fewest examples, 0.1 costs 10 % more than the fewest."
        )


def efficiency(batch_size: float, critical_batch_size: float) -> float:
    """Return E_min/E, the share of the examples that training at this batch size really needs.

    The statistical efficiency of Qiao et al. (Pollux, OSDI 2021, section 3.1), beside the smallest batch.
    """
    return 1.0 / examples_cost(batch_size, critical_batch_size)


def steps_cost(batch_size: float, critical_batch_size: float) -> float:
    """Return S/S_min = 1 + B_crit/B, optimizer steps over the fewest possible."""
    return 1.0 + critical_batch_size / batch_size


def examples_cost(batch_size: float, critical_batch_size: float) -> float:
    """Return E/E_min = 1 + B/B_crit, examples over the fewest possible."""
    if critical_batch_size == 0:
        return math.inf
    return 1.0 + batch_size / critical_batch_size


def steps_factor(old: float, new: float, critical_batch_size: float) -> float:
    """Return the steps to the same loss at batch size ``new``, over those at ``old``."""
    return examples_factor(old, new, critical_batch_size) * old / new


def examples_factor(old: float, new: float, critical_batch_size: float) -> float:
    """Return the examples to the same loss at batch size ``new``, over those at ``old``.

    Written so that the limits hold: new/old where B_crit is 0, and 1 where it is infinite.
    """
    if math.isinf(critical_batch_size):
        return 1.0
    return (critical_batch_size + new) / (critical_batch_size + old)
