"""How many more measurements bring the noise scale's interval down to a wished width."""

from __future__ import annotations

import math


def relative_half_width(noise_scale: float, lower: float, upper: float) -> float:
    """Return half the interval's length over the noise scale; infinite where the interval is open."""
    if not (math.isfinite(noise_scale) and noise_scale > 0 and math.isfinite(upper)):
        return math.inf
    return (upper - lower) / (2.0 * noise_scale)


def effective_size(num_measurements: float, ema_decay: float) -> float:
    """Return (Σw)²/Σw² of the weights 1, d, d², ...: how many equally weighted measurements an average is worth."""
    if ema_decay == 1.0:
        return num_measurements
    faded: float = ema_decay**num_measurements
    return (1.0 + ema_decay) / (1.0 - ema_decay) * (1.0 - faded) / (1.0 + faded)


def measurements_for(wished: float, present: float, num_measurements: int, ema_decay: float) -> float:
    """Return how many more measurements bring the relative half width down to the wished one.

    The half width falls like one over the root of the effective size. A moving average has a largest effective size,
    (1 + d)/(1 - d); where that is not enough no number of measurements is.

    Args:
        wished: Relative half width that is wanted; 0.2 is ±20 %.
        present: That of the present interval.
        num_measurements: How many it rests on.
        ema_decay: Weight of the past per measurement.

    Returns:
        A whole number, 0 where the interval is narrow enough, infinite where ``ema_decay`` must be nearer to 1,
        and NaN where the present interval is open and says nothing.
    """
    if not math.isfinite(present) or num_measurements < 1:
        return math.nan
    if present <= wished:
        return 0
    needed = effective_size(num_measurements, ema_decay) * (present / wished) ** 2
    if ema_decay == 1.0:
        return math.ceil(needed - num_measurements)
    largest = effective_size(math.inf, ema_decay)
    if needed >= largest:
        return math.inf
    # solve (1 - d^n) / (1 + d^n) = needed / largest
    faded = (1.0 - needed / largest) / (1.0 + needed / largest)
    return math.ceil(math.log(faded) / math.log(ema_decay) - num_measurements)


def decay_for(wished: float, present: float, num_measurements: int, ema_decay: float) -> float:
    """Return an ``ema_decay`` whose average is long enough for the wished half width, with half as much to spare."""
    needed = 1.5 * effective_size(num_measurements, ema_decay) * (present / wished) ** 2
    # two digits of what is missing to 1
    return 1.0 - float(f"{2.0 / (needed + 1.0):.1e}")
