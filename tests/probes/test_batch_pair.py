"""The pair of batches: exact whatever happens inside a batch, on one device, without a trace."""

from __future__ import annotations

import lightning as L
import pytest
from helpers.batch_dependent import (
    CASES,
    discriminator_loss,
    generator_loss,
    pairs_by_brute_force,
    parameters_of,
    step_loss,
)
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader, per_example_gradients, standard_errors, truth

from lightning_wn import GradientNoiseScaleCallback


def measure(model, data, steps=400, trainer_args=None, callbacks=(), **arguments):
    callback = GradientNoiseScaleCallback(**({"probe": "batch_pair", "every_n_steps": 1, "ema_decay": 1.0} | arguments))
    trainer = L.Trainer(callbacks=[callback, *callbacks], **(QUIET | {"max_steps": steps} | (trainer_args or {})))
    trainer.fit(model, data)
    return callback


def rejected(callback, optimizer=0):
    return callback._measurements[optimizer].metric.rejected


MEASUREMENTS = 300


def assert_truth(estimate, expected):
    """Within three standard errors of as many pairs, each of which is known to the brute force's spread."""
    mean, error, spread = expected
    allowed = 3 * (error.square() + spread.square() / MEASUREMENTS).sqrt()
    assert estimate.num_measurements == MEASUREMENTS
    assert not estimate.approximate
    # a test that could tell a factor of 1.25
    assert (allowed < 0.25 * mean).all(), (allowed / mean).tolist()
    assert abs(estimate.grad_sq_norm - mean[0]) < allowed[0]
    assert abs(estimate.cov_trace - mean[1]) < allowed[1]


class TestTruthAtFrozenWeights:
    @pytest.mark.parametrize("name", [name for name in CASES if name != "gan"])
    def test_one_loss(self, name):
        model, batches, batch_size = CASES[name]
        counted = {"batch_size_fn": lambda batch: batch["num_graphs"]} if name == "graphs" else {}
        L.seed_everything(7, verbose=False)
        # two steps a measurement: no batch is in two pairs
        callback = measure(model(), batches(0), steps=2 * MEASUREMENTS, every_n_steps=2, **counted)
        assert callback.estimate().batch_size == batch_size
        assert_truth(callback.estimate(), pairs_by_brute_force(model(), batches, batch_size, epochs=30, loss=step_loss))

    def test_both_losses_of_a_gan(self):
        model, batches, batch_size = CASES["gan"]
        callback = measure(model(), batches(0), steps=4 * MEASUREMENTS, every_n_steps=2)
        for index, (name, loss) in enumerate((("generator", generator_loss), ("discriminator", discriminator_loss))):
            expected = pairs_by_brute_force(
                model(), batches, batch_size, epochs=30, loss=loss, parameters=parameters_of(name)
            )
            assert_truth(callback.estimate(index), expected)

    def test_independent_examples(self):
        model, data = DigitsMLP(), digits()
        callback = measure(model, loader(data, 64), steps=801, every_n_steps=2)
        gradients = per_example_gradients(model, data)
        expected, spread = truth(gradients), standard_errors(gradients, [[64, 64]] * 14, 400)
        assert callback.estimate().num_measurements == 400
        assert abs(callback.estimate().grad_sq_norm - expected[0]) < 3 * spread[0] < 3 * 0.03 * expected[0]
        assert abs(callback.estimate().cov_trace - expected[1]) < 3 * spread[1] < 3 * 0.03 * expected[1]
