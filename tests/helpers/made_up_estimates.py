"""Estimates made up for the tests."""

import math

from lightning_wn import NoiseScaleEstimate
from lightning_wn.batch_size import RunConfiguration, advise_batch_size


def make_estimate(noise_scale, lower=None, upper=None, *, batch_size=32.0, num_measurements=400, unit="examples"):
    return NoiseScaleEstimate(
        grad_sq_norm=0.1 if math.isfinite(noise_scale) else -0.1,
        cov_trace=0.1 * noise_scale,
        noise_scale=noise_scale,
        lower=0.9 * noise_scale if lower is None else lower,
        upper=1.1 * noise_scale if upper is None else upper,
        batch_size=batch_size,
        num_measurements=num_measurements,
        coverage=1.0,
        unit=unit,
        probe="micro_batch",
        confidence=0.95,
    )


def make_advice(*args, accumulate=4, ranks=1, **kwargs):
    configuration = RunConfiguration(accumulate_grad_batches=accumulate, num_ranks=ranks)
    return advise_batch_size(make_estimate(*args, **kwargs), configuration)
