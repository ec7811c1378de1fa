"""The per-example probe in the callback: one device without accumulation, exact."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader, per_example_gradients, truth
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_wn import GradientNoiseScaleCallback, WeightNormCallback
from lightning_wn.noise_scale.samples import Rejection


def measure(model, data, steps=400, accumulate=1, trainer_args=None, callbacks=(), **arguments):
    callback = GradientNoiseScaleCallback(**({"every_n_steps": 1, "ema_decay": 1.0} | arguments))
    settings = QUIET | {"max_steps": steps, "accumulate_grad_batches": accumulate} | (trainer_args or {})
    L.Trainer(callbacks=[*callbacks, callback], **settings).fit(model, data)
    return callback


def standard_errors(gradients: torch.Tensor, batch_size: int, measurements: int) -> torch.Tensor:
    """Standard errors of the mean |G|² and tr(Σ), by simulating the design."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for _ in range(400):
        batch = gradients[torch.randperm(len(gradients), generator=generator)[:batch_size]]
        small, big = batch.square().sum(1).mean(), batch.mean(0).square().sum()
        pairs.append(((batch_size * big - small) / (batch_size - 1), (small - big) / (1 - 1 / batch_size)))
    return torch.tensor(pairs).std(0) / measurements**0.5


@pytest.mark.parametrize("batch_size", [32, 128])
def test_truth(batch_size):
    model, data = DigitsMLP(), digits()
    callback = measure(model, loader(data, batch_size))
    estimate = callback.estimate()
    gradients = per_example_gradients(model, data)
    expected = truth(gradients)
    spread = standard_errors(gradients, batch_size, 400)
    assert (estimate.probe, estimate.coverage, estimate.approximate) == ("per_example", 1.0, False)
    assert (estimate.num_measurements, estimate.batch_size) == (400, batch_size)
    assert abs(estimate.grad_sq_norm - expected[0]) < 3 * spread[0]
    assert abs(estimate.cov_trace - expected[1]) < 3 * spread[1]


def test_one_step_is_the_textbook_formula():
    """(B|ḡ|² - mean|g_i|²)/(B - 1) and its partner."""
    model, data = DigitsMLP(), digits(24)
    gradients = per_example_gradients(model, data)
    small, big = gradients.square().sum(1).mean(), gradients.mean(0).square().sum()
    estimate = measure(model, loader(data, 24), steps=1).estimate()
    # float32 gradients
    assert estimate.grad_sq_norm == pytest.approx(float((24 * big - small) / 23), rel=1e-4)
    assert estimate.cov_trace == pytest.approx(float((small - big) / (1 - 1 / 24)), rel=1e-4)


def test_agrees_with_micro_batches_on_the_same_steps():
    model, data = DigitsMLP(), digits(640)
    gradients = per_example_gradients(model, data)
    expected = truth(gradients)
    accumulated = measure(model, loader(data), steps=200, accumulate=2, probe="per_example")
    estimate = accumulated.estimate()
    spread = standard_errors(gradients, 64, 200)
    assert estimate.batch_size == 64
    assert accumulated.advise().configuration.accumulate_grad_batches == 2
    assert abs(estimate.grad_sq_norm - expected[0]) < 3 * spread[0]
    assert abs(estimate.cov_trace - expected[1]) < 3 * spread[1]


@pytest.mark.parametrize("order", [0, 1])
def test_with_weight_normalization_as_a_newcomer_would(order):
    """Two lines, both callbacks, one device: the noise scale of g and v, in either order."""
    callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0)
    callbacks = [WeightNormCallback(), callback]
    model = DigitsMLP()
    L.Trainer(callbacks=callbacks[:: 1 - 2 * order], max_steps=60, **QUIET).fit(model, loader(digits()))
    micro_batch = measure(model, loader(digits(), 8), steps=200, accumulate=4)
    estimate, other = callback.estimate(), micro_batch.estimate()
    assert estimate.num_measurements == 60
    assert estimate.coverage == 1.0
    # two designs of 60 and 200 measurements: about 8 % and 3 %
    assert estimate.cov_trace == pytest.approx(other.cov_trace, rel=0.15)
    assert estimate.grad_sq_norm == pytest.approx(other.grad_sq_norm, rel=0.3)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_training_is_bit_for_bit_unchanged(optimizer):
    results = []
    for callbacks in ([], [GradientNoiseScaleCallback(every_n_steps=1)], [GradientNoiseScaleCallback(every_n_steps=7)]):
        model = DigitsMLP(lr=0.05, optimizer=optimizer)
        model.net.append(nn.ReLU(inplace=True))
        model.net.append(nn.Dropout(0.2))
        L.seed_everything(3, verbose=False)
        trainer = L.Trainer(callbacks=callbacks, max_epochs=2, gradient_clip_val=0.05, **QUIET)
        trainer.fit(model, loader(digits(500), drop_last=False))
        results.append((model.state_dict(), torch.get_rng_state()))
    for state, random_state in results[1:]:
        assert all(torch.equal(state[key], value) for key, value in results[0][0].items())
        assert torch.equal(random_state, results[0][1])


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaler(fused):
    class Model(DigitsMLP):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.0, fused=fused)

    plain = measure(Model(), loader(digits()), steps=30)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    scaled = measure(Model(), loader(digits()), steps=30, trainer_args={"plugins": [plugin]})
    assert scaled.estimate().num_measurements == 30
    # 11 bits of mantissa in the products
    assert scaled.estimate().grad_sq_norm == pytest.approx(plain.estimate().grad_sq_norm, rel=0.02)
    assert scaled.estimate().cov_trace == pytest.approx(plain.estimate().cov_trace, rel=0.02)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision):
    data = digits(dtype=torch.float64 if precision == "64-true" else torch.float32)
    plain = measure(DigitsMLP(), loader(digits()), steps=30)
    other = measure(DigitsMLP(), loader(data), steps=30, trainer_args={"precision": precision})
    # 8 bits of mantissa in the products
    assert other.estimate().noise_scale == pytest.approx(plain.estimate().noise_scale, rel=0.1)


def test_the_last_batch_of_one_example_is_left_out():
    callback = measure(DigitsMLP(), loader(digits(33), drop_last=False), steps=8)
    assert callback.estimate().num_measurements == 4
    assert callback._measurements[0].metric.rejected[Rejection.SINGLE_SAMPLE] == 4
    assert callback.estimate().batch_size == 32


def test_batch_norm_and_compiled_models_go_to_the_pair_of_batches():
    mixing = DigitsMLP()
    mixing.net.insert(1, nn.BatchNorm1d(32))
    compiled = DigitsMLP()
    compiled.net = torch.compile(compiled.net, backend="eager")
    for model in (mixing, compiled):
        callback = measure(model, loader(digits()), steps=5)
        assert (callback.estimate().probe, callback.estimate().num_measurements) == ("batch_pair", 4)


def test_what_cannot_be_measured_is_said_before_training():
    model = DigitsMLP(lr=0.1)
    model.net.insert(1, nn.BatchNorm1d(32))
    before = model.net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'net.1' makes use of batch statistics.*accumulate_grad_batches=2"):
        measure(model, loader(digits()), probe="per_example")
    assert torch.equal(before, model.net[0].weight)


class Mixes(DigitsMLP):
    """Subtracts the batch's mean, which gives no example a gradient of its own, in some batches."""

    def __init__(self, first: int) -> None:
        super().__init__(lr=0.1)
        self.first = first

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx >= self.first:
            weight = self.net[0].weight
            return nn.functional.cross_entropy(self.net(x) + (x @ weight.T)[:, :10], y)
        return super().training_step(batch, batch_idx)


def test_what_shows_in_the_first_step_is_an_error_before_the_optimizer_moves():
    model = Mixes(first=0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"`probe='per_example'`: .*accumulate_grad_batches"):
        measure(model, loader(digits()), steps=5, probe="per_example")
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_what_shows_later_leaves_the_step_out_or_is_measured():
    """A step of the same layers is not verified again; where the calls differ, it is left out in words."""

    class Twice(Mixes):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + 0.0 * self.net[2](torch.zeros(1, 32)).sum() if batch_idx >= self.first else loss

    with pytest.warns(UserWarning, match="leaves out steps, and says so once"):
        callback = measure(Twice(first=3), loader(digits(320)), steps=10, probe="per_example")
    assert callback.estimate().num_measurements == 3


def test_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="`probe='per_example'` is for one device, and this run has 2 ranks"):
        measure(DigitsMLP(), loader(digits()), probe="per_example")


def test_hooks_are_gone_afterwards():
    model = DigitsMLP()
    measure(model, loader(digits()), steps=5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
