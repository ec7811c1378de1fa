"""The sentences that advice is made of."""

from __future__ import annotations

import math

from lightning_wn.batch_size.run import ObservedRun, RunConfiguration
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.text import format_count

LEARNING_RATE_MATTERS = (
    "The noise scale depends on the learning rate: on handwritten digits it predicted 36 at the tuned rate of SGD, "
    "where 34 was measured, and 124 at a quarter of it. Tune the rate first, and measure again after a change."
)
MOMENTUM_MATTERS = (
    "Momentum is not in it: on six small tasks with Adam the critical batch size was 1.3 to 3.4 times the noise scale; "
    "`measure_critical_batch_size` measures it."
)


def no_suggestion(estimate: NoiseScaleEstimate) -> str:
    """Say why there is nothing to suggest."""
    if not estimate.num_measurements:
        return "No advice on the batch size: the noise scale was not measured yet."
    if estimate.impossible:
        return f"No advice on the batch size: {alarm(estimate)}"
    if estimate.repeated:
        return "No advice on the batch size: |G|² is not above zero, and every step has the same examples."
    return "No advice on the batch size: |G|² is not above zero yet; measure more steps." + at_least(estimate)


def alarm(estimate: NoiseScaleEstimate) -> str:
    """Say what an impossible estimate means, and what it comes from."""
    return (
        f"{estimate.what_is_negative} is negative beyond doubt, so that the gradient samples and the optimizer's "
        "gradient do not belong together; likely causes are a loss that is not a mean over what is counted "
        "(`batch_size_fn`, `loss_mean_over`), gradients that are edited between the backward pass and the step, "
        "samples of one step that were chosen to differ (balanced classes), and a data set that is learned by heart, "
        "whose own gradient is smaller than what chance leaves of it."
    )


def at_least(estimate: NoiseScaleEstimate) -> str:
    """Say how large the noise scale is at least, behind another sentence; empty where nobody knows."""
    if not 0.0 < estimate.lower < math.inf:
        return ""
    return f" The noise scale is probably above {format_count(estimate.lower)} {estimate.unit}."


def way_there(configuration: RunConfiguration, ratio: float, accumulate_grad_batches: int, num_ranks: int) -> str:
    """Say what gives so many times the batch size: accumulation, or more ranks, as far as they are known."""
    if configuration.accumulate_grad_batches is None:
        return f"{ratio:.2g} times the present one"
    way = f"accumulate_grad_batches={accumulate_grad_batches} instead of {configuration.accumulate_grad_batches}"
    if num_ranks > configuration.num_ranks:
        way += f", or {num_ranks} ranks instead of {configuration.num_ranks}"
    return way


def change(factor: float, what: str) -> str:
    """Say "2.5x fewer steps", "1.6x the examples" or "as many steps"."""
    times = f"{max(factor, 1.0 / factor):.2g}x"
    if times == "1x":
        return f"as many {what}"
    return f"{times} the {what}" if factor > 1.0 else f"{times} fewer {what}"


def times_noise_scale(target: float) -> str:
    """Name the wished batch size."""
    return "the noise scale" if target == 1 else f"{target:g} times the noise scale"


def costs(target: float, unit: str) -> str:
    """Say what training costs at the target, over the fewest possible examples and steps."""
    examples, steps = ("twice" if cost == 2 else f"{cost:.3g} times" for cost in (1 + target, 1 + 1 / target))
    fewer = " (`target=0.1` costs 10 % more than the fewest)" if target == 1 else ""
    return (
        f"At {times_noise_scale(target)} training costs {examples} the fewest possible {unit}{fewer} and {steps} the "
        "fewest possible steps."
    )


def smaller_micro_batch(estimate: NoiseScaleEstimate, configuration: RunConfiguration, target: float) -> str:
    """Say how to get below one micro-batch on every rank, which accumulation cannot; empty where there is no need."""
    smallest, wished = configuration.smallest_of(estimate.batch_size), target * estimate.noise_scale
    if math.isnan(smallest) or wished >= 0.7 * smallest:
        return ""
    # one device measures with two micro-batches or more
    accumulate = 2 if configuration.num_ranks == 1 else 1
    micro_batch = max(1, round(wished / (accumulate * configuration.num_ranks)))
    wish = times_noise_scale(target)
    return (
        f"{wish[0].upper() + wish[1:]} is below one micro-batch per rank ({format_count(smallest)} {estimate.unit} in "
        f"all): micro-batches of about {format_count(micro_batch)} with accumulate_grad_batches={accumulate} would "
        "come closer."
    )


def assumptions(run: ObservedRun, *, on_more_ranks: bool) -> str:
    """Say what the times of other batch sizes rest on; empty where there are none."""
    time, steps = run.time, run.total_steps
    if time is None:
        return ""
    text = f"Times to the loss that {steps:,} steps of now reach" if steps else "Times to the same loss"
    text += f", at {time.micro_batch_seconds:.3g} s a micro-batch and {time.step_seconds:.3g} s a step beside"
    if not time.is_split:
        text += " (not told apart)"
    if time.includes_measuring:
        text += ", measuring included"
    if on_more_ranks:
        text += "; on more ranks if these stay what they are, with communication as it is now"
    return text + "."
