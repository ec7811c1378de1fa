"""How often the interval holds the truth, on measurements of a network that really learns."""

from __future__ import annotations

import random

import lightning as L
import pytest
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.noise_scale.samples import Measurement, measurement_from_row
from lightning_wn.noise_scale.statistics import PairMoments


class Recorder(L.Callback):
    """Keeps every step's pair (|G|², tr Σ)."""

    def __init__(self, callback):
        self.callback = callback
        self.pairs = []

    def on_train_end(self, trainer, pl_module):
        # the callback's own `on_train_end` comes later and folds them
        for row in self.callback._measurements[0].metric.pending.tolist():
            measured = measurement_from_row(row, 0.01)
            assert isinstance(measured, Measurement)
            self.pairs.append(measured.pairs[0])


def record(probe):
    """400 steps of a run: from a loss of 2.3 to one of about 0.3, skewed and heavy-tailed as such a run is."""
    accumulate = 4 if probe == "micro_batch" else 1
    callback = GradientNoiseScaleCallback(probe, every_n_steps=1)
    recorder = Recorder(callback)
    settings = QUIET | {"max_steps": 400, "accumulate_grad_batches": accumulate, "log_every_n_steps": 10_000}
    trainer = L.Trainer(callbacks=[recorder, callback], **settings)
    trainer.fit(DigitsMLP(lr=0.05), loader(digits(), 32 // accumulate))
    assert len(recorder.pairs) == 400
    return recorder.pairs


@pytest.fixture(scope="module", params=["micro_batch", "per_example"])
def pairs(request):
    return record(request.param)


@pytest.mark.parametrize(("decay", "count"), [(1.0, 100), (1.0, 400), (0.99, 400)])
def test_coverage_of_a_bootstrapped_run(pairs, decay, count):
    """2,000 runs drawn from the recorded measurements: the ratio of their means is the truth."""
    draw = random.Random(0)
    truth = sum(y for _, y in pairs) / sum(x for x, _ in pairs)
    held = 0
    for _ in range(2000):
        moments = PairMoments()
        for x, y in draw.choices(pairs, k=count):
            moments = moments.updated(x, y, decay)
        lower, upper = moments.interval(0.95)
        held += lower <= truth <= upper
    # 2,000 runs tell a coverage to 0.01 (two standard errors)
    assert 0.92 <= held / 2000 <= 0.98
