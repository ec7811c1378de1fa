"""From a noise scale to the next accumulation factor and learning rate: pure rules, no Lightning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_wn.arguments import is_between, is_whole

# factors of many small primes line up with the present windows soon; for that a step may fall so much short
_GIVEN_UP_FOR_ALIGNMENT = 0.2


@dataclass(frozen=True, kw_only=True)
class AccumulationRule:
    """Moves the batch size toward the fraction ``target`` of the noise scale, carefully.

    It raises as far as the *lower* end of the noise scale's interval allows and lowers only where the *upper* end
    asks for it. So a wide interval changes nothing, and at B = θ·B_crit examples cost at most 1 + θ of the fewest
    possible (arXiv 1812.06162, section 2.3) with the interval's confidence.

    Attributes:
        target: θ, the wished fraction of the noise scale, positive.
        min_accumulate: Fewest micro-batches in an optimizer step of each rank.
        max_accumulate: Most of them; None is unbounded.
        growth: Largest factor of one change, above 1; a change by one micro-batch is always allowed.
        hysteresis: Nothing changes unless the wish is this share above (below) the present batch size.
        allow_decrease: Whether the batch size may become smaller again.
    """

    target: float = 0.1
    min_accumulate: int = 1
    max_accumulate: int | None = None
    growth: float = 2.0
    hysteresis: float = 0.1
    allow_decrease: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not is_between(self.target, 0.0):
            raise ValueError(
                f"`target` must be a positive fraction of the noise scale, got {self.target!r}; 0.1 costs 10 % more "
                "examples than the fewest possible, 1.0 twice as many."
            )
        if not is_whole(self.min_accumulate):
            raise ValueError(
                f"`min_accumulate` must be a positive whole number of micro-batches, got {self.min_accumulate!r}."
            )
        if self.max_accumulate is not None and not is_whole(self.max_accumulate, self.min_accumulate):
            raise ValueError(
                f"`max_accumulate` must be a whole number of micro-batches not below "
                f"`min_accumulate={self.min_accumulate}`, or None for no bound, got {self.max_accumulate!r}."
            )
        if not is_between(self.growth, 1.0):
            raise ValueError(f"`growth` must be a finite factor above 1, got {self.growth!r}; 2.0 doubles at most.")
        if not 0.0 <= self.hysteresis < math.inf:
            raise ValueError(
                f"`hysteresis` must be a share of the batch size, 0 or more, got {self.hysteresis!r}; 0.1 ignores "
                "wishes within 10 % of the present batch size."
            )

    def bounded(self, factor: int) -> int:
        """Return the factor within ``min_accumulate`` and ``max_accumulate`` that is nearest to this one."""
        above = max(factor, self.min_accumulate)
        return above if self.max_accumulate is None else min(above, self.max_accumulate)

    def wished_batch_size(self, present: int, *, micro_batch: float, lower: float, upper: float) -> float:
        """Return the batch size to go to, before bounds: the present one where the interval holds it.

        Args:
            present: Micro-batches in an optimizer step of each rank.
            micro_batch: Size of one micro-batch on all ranks together, in the noise scale's unit.
            lower: Lower end of the noise scale's interval.
            upper: Its upper end.
        """
        batch_size = present * micro_batch
        return max(self.target * lower, min(batch_size, self.target * upper))

    def next_factor(
        self, present: int, *, micro_batch: float, lower: float, upper: float, most: float = math.inf
    ) -> int:
        """Return the next ``accumulate_grad_batches``; the present one where nothing should change.

        Args:
            present: Micro-batches in an optimizer step of each rank.
            micro_batch: Size of one micro-batch on all ranks together, in the noise scale's unit.
            lower: Lower end of the noise scale's interval.
            upper: Its upper end.
            most: A further upper bound, such as the batches in an epoch.
        """
        if not micro_batch > 0.0 or math.isnan(lower) or math.isnan(upper):
            return present
        wish = self.wished_batch_size(present, micro_batch=micro_batch, lower=lower, upper=upper) / micro_batch
        largest = math.floor(min(most, math.inf if self.max_accumulate is None else self.max_accumulate, 2.0**53))
        if wish >= present * (1.0 + self.hysteresis):
            limit = math.floor(min(wish, max(present + 1, present * self.growth), largest))
            if limit <= present:
                return present
            first = max(present + 1, math.ceil(limit * (1.0 - _GIVEN_UP_FOR_ALIGNMENT)))
            return min(range(limit, first - 1, -1), key=lambda factor: math.lcm(factor, present))
        if self.allow_decrease and wish * (1.0 + self.hysteresis) <= present:
            limit = max(math.ceil(wish), math.ceil(min(present - 1, present / self.growth)), self.min_accumulate)
            if limit >= present:
                return present
            last = min(present - 1, math.floor(limit * (1.0 + _GIVEN_UP_FOR_ALIGNMENT)))
            return min(range(limit, last + 1), key=lambda factor: math.lcm(factor, present))
        return present
