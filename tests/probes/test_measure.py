"""measure_noise_scale: the truth at fixed weights, and nothing else changed."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader, per_example_gradients, truth
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from torchmetrics import MeanMetric

from lightning_wn import measure_noise_scale


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_truth():
    model, data = DigitsMLP(), digits()
    estimate = measure_noise_scale(model, loader(data), relative_error=0.05, confidence=0.99)
    grad_sq_norm, cov_trace = truth(per_example_gradients(model, data))
    # the interval was asked for: 5 % at 99 %
    assert estimate.lower < cov_trace / grad_sq_norm < estimate.upper
    assert (estimate.upper - estimate.lower) / 2 <= 0.05 * estimate.noise_scale
    assert estimate.num_measurements > 50


def test_examples_are_samples():
    """From the same batches, examples tell tr(Σ) as well, and what it is in each window exactly."""
    model, data = DigitsMLP(), digits()
    options = {"max_batches": 200, "relative_error": 1e-9}
    estimate = measure_noise_scale(model, loader(data), probe="per_example", **options)
    grad_sq_norm, cov_trace = truth(per_example_gradients(model, data))
    assert estimate.lower < cov_trace / grad_sq_norm < estimate.upper
    assert (estimate.probe, estimate.num_measurements, estimate.batch_size) == ("per_example", 50, 32)
    # 6,400 gradients of the population's 1,797: 50 windows of batches of 32 alone are known to 3 %
    assert estimate.cov_trace == pytest.approx(cov_trace, rel=0.02)
    batches = measure_noise_scale(model, loader(data), **options)
    assert estimate.grad_sq_norm == pytest.approx(batches.grad_sq_norm, rel=0.02)
    assert all(p.grad is None for p in model.parameters())


def test_examples_that_are_not_in_the_first_dimension():
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    batches = list(torch.randn(3, 4, 4, 8))

    def loss(module, batch):
        return module(batch.transpose(0, 1)).square().mean()

    examples = [example for batch in batches for example in batch]
    grads = [torch.autograd.grad(loss(module, example[None]), list(module.parameters())) for example in examples]
    spread = torch.stack([torch.cat([g.flatten() for g in row]).double() for row in grads]).var(0).sum()
    options = {"probe": "per_example", "max_batches": 3, "relative_error": 1e-9}
    estimate = measure_noise_scale(module, batches, loss, batch_dims={"*": 1}, **options)
    # float32 gradients
    assert estimate.cov_trace == pytest.approx(float(spread), rel=1e-4)
    with pytest.raises(ValueError, match=r"`probe='per_example'`: .*batch_dims"):
        measure_noise_scale(module, batches, loss, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"probe": "sharded"}, "`probe` must be 'micro_batch' or 'per_example', got 'sharded'; the first is right"),
        ({"probe": "per_example", "curvature": True}, "`curvature=True` multiplies gradients of whole batches; leave"),
        ({"batch_dims": {"net": 1}}, "`batch_dims` says where examples lie in a batch; set `probe='per_example'`"),
    ],
)
def test_ways_that_there_are_not(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure_noise_scale(DigitsMLP(), loader(digits()), **options)


def test_a_training_step_without_batch_idx():
    class BatchAlone(DigitsMLP):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    whole = measure_noise_scale(DigitsMLP(), loader(digits()), max_batches=8)
    assert measure_noise_scale(BatchAlone(), loader(digits()), max_batches=8) == whole


def test_stops_as_soon_as_it_knows_enough():
    few = measure_noise_scale(DigitsMLP(), loader(digits()), relative_error=0.3)
    many = measure_noise_scale(DigitsMLP(), loader(digits()), relative_error=0.1)
    assert 3 <= few.num_measurements < many.num_measurements / 2


def test_stops_at_max_batches():
    estimate = measure_noise_scale(DigitsMLP(), loader(digits()), relative_error=1e-6, max_batches=43)
    assert estimate.num_measurements == 11  # the last of 3 batches
    assert estimate.batch_size == 32


def test_plain_module_with_a_loss_function_is_the_same():
    model = DigitsMLP()
    module = measure_noise_scale(model.net, loader(digits()), cross_entropy, max_batches=40)
    assert module == measure_noise_scale(model, loader(digits()), max_batches=40)


@pytest.mark.parametrize("curvature", [False, True])
def test_a_compiled_module_is_measured_as_it_is(curvature):
    """What was compiled computes with the weights of the original, and a copy's gradients would all be zero."""
    options = {"max_batches": 20, "curvature": curvature}
    compiled = from_compiled(torch.compile(DigitsMLP(), backend="aot_eager"))
    assert measure_noise_scale(compiled, loader(digits()), **options) == measure_noise_scale(
        DigitsMLP(), loader(digits()), **options
    )
    assert compiled._compiler_ctx is not None


def test_uneven_batches():
    model, data = DigitsMLP(), digits(176)
    estimate = measure_noise_scale(model, loader(data, drop_last=False), relative_error=0.03, confidence=0.99)
    grad_sq_norm, cov_trace = truth(per_example_gradients(model, data))
    assert estimate.lower < cov_trace / grad_sq_norm < estimate.upper


class Stateful(DigitsMLP):
    """Everything that a training step could change."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.net.insert(1, nn.BatchNorm1d(32))
        self.net.append(nn.Dropout(0.1))
        self.losses = MeanMetric()
        self.calls = 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.update(loss.detach())
        self.calls += 1
        return {"loss": loss}


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_is_touched(trained):
    model = Stateful()
    if trained:
        trainer = L.Trainer(max_steps=3, **QUIET)
        trainer.fit(model, loader(digits()))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad for p in model.parameters()]
    calls, updates = model.calls, model.losses._update_count
    random_state = torch.get_rng_state()
    measure_noise_scale(model, loader(digits()), max_batches=12)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(old is new.grad for old, new in zip(gradients, model.parameters(), strict=True))
    assert (model.calls, model.losses._update_count) == (calls, updates)
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(module.training for module in model.modules() if not isinstance(module, MeanMetric))


def test_data_module_and_generator():
    class Data(L.LightningDataModule):
        def setup(self, stage):
            self.stage = stage

        def train_dataloader(self):
            return loader(digits())

    whole = measure_noise_scale(DigitsMLP(), loader(digits()), max_batches=40)
    assert measure_noise_scale(DigitsMLP(), Data(), max_batches=40) == whole
    assert measure_noise_scale(DigitsMLP(), (b for b in loader(digits())), max_batches=40) == whole


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"relative_error": 0}, "`relative_error` must be a positive number, got 0"),
        ({"samples_per_measurement": 1}, "`samples_per_measurement` must be 2 or more, got 1"),
        ({"model": nn.Linear(64, 10)}, "`loss_fn` is needed for a Linear"),
        ({"model": DigitsMLP().requires_grad_(False)}, "no parameter with `requires_grad=True`"),
        ({"max_batches": 1}, "`data` gave 1 batches, none of two or more"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, "The loss of a batch must be one number"),
        ({"batch_size_fn": lambda batch: 0}, "`data` gave a batch that counts no example"),
        ({"confidence": 2}, "`confidence` must lie between 0 and 1"),
    ],
)
def test_bad_input(arguments, sentence):
    arguments = {"model": DigitsMLP(), "data": loader(digits())} | arguments
    with pytest.raises(ValueError, match=sentence):
        measure_noise_scale(**arguments)


def test_tokens_are_not_independent_of_each_other():
    """Sequences of one token each, told to be five: nothing but the batches' own variance counts."""
    model, data = DigitsMLP(), digits()
    tokens = measure_noise_scale(
        model, loader(data), max_batches=400, relative_error=1e-6, unit="tokens", batch_size_fn=lambda batch: 160
    )
    examples = measure_noise_scale(model, loader(data), max_batches=400, relative_error=1e-6)
    # loaders of equal batches: the same numbers, five tokens an example; passes of 56 batches are cut alike
    assert tokens.noise_scale == pytest.approx(5 * examples.noise_scale, rel=1e-3)
    assert tokens.grad_sq_norm == pytest.approx(examples.grad_sq_norm, rel=1e-6)
    assert (tokens.unit, tokens.batch_size, tokens.num_measurements) == ("tokens", 160.0, 100)


def test_tokens_in_windows_of_four_and_of_two_batches():
    """As a pass over 6 batches leaves them: V of both is taken at its own number of batches."""
    arguments = {"max_batches": 240, "relative_error": 1e-6}
    data = digits(192)
    tokens = measure_noise_scale(DigitsMLP(), loader(data), unit="tokens", batch_size_fn=lambda batch: 160, **arguments)
    examples = measure_noise_scale(DigitsMLP(), loader(data), **arguments)
    assert (tokens.num_measurements, examples.num_measurements) == (80, 80)
    # the same batches in other weights; taken alike they would be 12 % off
    assert tokens.cov_trace == pytest.approx(5 * examples.cov_trace, rel=0.04)
