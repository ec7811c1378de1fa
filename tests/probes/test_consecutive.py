"""The consecutive probe: successive gradients on one device, whatever the layers."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader, per_example_gradients, standard_errors, truth
from torch import nn
from torch.nn.utils import parameters_to_vector

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.noise_scale.samples import Rejection


class BatchNormMLP(DigitsMLP):
    """A network whose gradient is no mean over examples: each depends on its whole batch."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr)
        self.net.insert(1, nn.BatchNorm1d(32))


def measure(model, data, steps=400, accumulate=1, trainer_args=None, callbacks=(), **arguments):
    callback = GradientNoiseScaleCallback(
        **({"probe": "consecutive", "every_n_steps": 1, "ema_decay": 1.0} | arguments)
    )
    settings = QUIET | {"max_steps": steps, "accumulate_grad_batches": accumulate} | (trainer_args or {})
    L.Trainer(callbacks=[callback, *callbacks], **settings).fit(model, data)
    return callback


def batch_gradients(model: BatchNormMLP, data, count: int, batch_size: int = 32) -> torch.Tensor:
    """Gradients of many random batches, by brute force."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(count):
        chosen = torch.randperm(len(data), generator=generator)[:batch_size]
        loss = model.training_step(data[chosen], 0)
        rows.append(parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))).double())
    return torch.stack(rows)


@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_truth_on_a_frozen_network(every_n_steps):
    model, data = DigitsMLP(), digits()
    with pytest.warns(UserWarning, match="'consecutive', which is approximate.*accumulate_grad_batches=2.*is exact"):
        callback = measure(model, loader(data, 64), steps=400 * every_n_steps + 1, every_n_steps=every_n_steps)
    estimate = callback.estimate()
    gradients = per_example_gradients(model, data)
    expected, spread = truth(gradients), standard_errors(gradients, [[64, 64]] * 14, 400)
    assert estimate.num_measurements == 400
    assert estimate.probe == "consecutive"
    assert estimate.approximate
    assert estimate.batch_size == 64
    assert abs(estimate.grad_sq_norm - expected[0]) < 3 * spread[0] < 3 * 0.03 * expected[0]
    # pairs that share a gradient know a little less of tr(Σ)
    assert abs(estimate.cov_trace - expected[1]) < 3 * 2**0.5 * spread[1] < 3 * 0.03 * expected[1]
    assert str(estimate).startswith("approximate noise scale")


def test_truth_on_a_frozen_batch_norm_network():
    model, data = BatchNormMLP(), digits()
    callback = measure(model, loader(data, 64), steps=401)
    gradients = batch_gradients(BatchNormMLP(), data, 3000, batch_size=64)
    mean, variance = gradients.mean(0), gradients.var(0).sum()
    # of N examples a batch of n sees 1 - n/N of the variance, and n times that is what the equations call tr(Σ)
    cov_trace = float(64 * variance / (1 - 64 / len(data)))
    grad_sq_norm = float(mean @ mean - variance / len(gradients)) - cov_trace / len(data)
    estimate = callback.estimate()
    # 400 measurements of two samples of 64: 1.8 % and 2 % on this network without batch norm; brute force adds 1 %
    assert estimate.grad_sq_norm == pytest.approx(grad_sq_norm, rel=3 * 0.021)
    assert estimate.cov_trace == pytest.approx(cov_trace, rel=3 * 0.03)


def test_training_is_bit_for_bit_unchanged():
    states = []
    for callbacks in ([], *([GradientNoiseScaleCallback("consecutive", every_n_steps=n)] for n in (1, 3))):
        model = BatchNormMLP(lr=0.1)
        trainer = L.Trainer(callbacks=callbacks, max_epochs=2, gradient_clip_val=0.1, **QUIET)
        trainer.fit(model, loader(digits(500), drop_last=False))
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_bias_while_training_is_small_and_points_up():
    """Against accumulation over the same number of examples, on a network that learns."""
    data = digits()
    exact = measure(DigitsMLP(lr=0.05), loader(data, 16), steps=300, accumulate=2, probe="micro_batch")
    model = DigitsMLP(lr=0.05)
    approximate = measure(model, loader(data, 32), steps=300)
    ratio = approximate.estimate().noise_scale / exact.estimate().noise_scale
    assert 0.7 < ratio < 1.6


def test_pairs_are_of_successive_steps_only():
    callback = measure(DigitsMLP(), loader(digits()), steps=40, every_n_steps=5)
    assert callback.estimate().num_measurements == 8


def test_a_gradient_that_is_not_finite_spoils_its_pairs_only():
    class Poison(DigitsMLP):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 6 else loss

        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0.0)

    with pytest.warns(UserWarning, match="NaN or infinite"):
        callback = measure(Poison(), loader(digits(640)), steps=20)
    assert callback._measurements[0].metric.rejected[Rejection.NON_FINITE] == 2
    assert callback.estimate().num_measurements == 17


def test_ragged_batches():
    model, data = DigitsMLP(), digits(176)
    callback = measure(model, loader(data, drop_last=False), steps=601)
    gradients = per_example_gradients(model, data)
    expected = truth(gradients)
    spread = standard_errors(gradients, [[32, 32], [32, 32], [32, 16]], 600)
    assert callback.estimate().batch_size == 32
    assert abs(callback.estimate().cov_trace - expected[1]) < 3 * 2**0.5 * spread[1]


def test_loss_scaler_with_a_fused_optimizer():
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Fused(DigitsMLP):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.0, fused=True)

    plain = measure(Fused(), loader(digits()), steps=30)
    # the scale doubles in between, so the kept gradient has another scale than the present one
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=4)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    scaled = measure(Fused(), loader(digits()), steps=30, trainer_args={"plugins": [plugin]})
    assert scaled.estimate().num_measurements == 29
    # 11 bits of mantissa in the products
    assert scaled.estimate().grad_sq_norm == pytest.approx(plain.estimate().grad_sq_norm, rel=0.02)
    assert scaled.estimate().cov_trace == pytest.approx(plain.estimate().cov_trace, rel=0.02)
