"""The noise scale in tokens: a loss that is a mean over unmasked tokens, against per-token gradients."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, truth
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.noise_scale.samples import Rejection
from lightning_wn.noise_scale.statistics import PairMoments, solve_noise_scale

LENGTH = 12


def sentences(count=512):
    """Sequences of independent tokens, each cut to a length of its own; example 3 is masked out."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, LENGTH, 5, generator=generator, dtype=torch.float64)
    y = x.sum(2) + torch.randn(count, LENGTH, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, LENGTH + 1, (count,), generator=generator)
    lengths[3] = 0
    mask = (torch.arange(LENGTH) < lengths[:, None]).double()
    return TensorDataset(x, y, mask)


class TokenModel(L.LightningModule):
    """Linear regression of every token."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 1, dtype=torch.float64)
        nn.init.constant_(self.layer.weight, 0.3)
        nn.init.zeros_(self.layer.bias)

    def training_step(self, batch, batch_idx):
        x, y, mask = batch
        errors = (self.layer(x).squeeze(2) - y).square() * mask
        return errors.sum() / mask.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def per_token_gradients(data):
    """Gradient of each token's own loss, zero where masked: shape (examples, tokens, parameters)."""
    x, y, mask = data.tensors
    model = TokenModel()
    slope = 2 * (model.layer(x).squeeze(2) - y).detach() * mask
    return torch.cat((slope[..., None] * x, slope[..., None]), dim=2)


def tokens_of_batch(batch):
    return batch[2].sum()


def tokens_of_examples(batch):
    return batch[2].sum(1)


def measure(data, batch_size, accumulate, steps, shuffle=True, **arguments):
    callback = GradientNoiseScaleCallback(**({"every_n_steps": 1, "ema_decay": 1.0, "unit": "tokens"} | arguments))
    settings = QUIET | {"max_steps": steps, "accumulate_grad_batches": accumulate}
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(data, batch_size, shuffle=shuffle, generator=generator, drop_last=True)
    L.Trainer(callbacks=[callback], **settings).fit(TokenModel(), loader)
    return callback


@pytest.mark.parametrize(
    ("probe", "count", "accumulate"),
    [
        ("micro_batch", tokens_of_batch, 4),
        ("micro_batch", tokens_of_examples, 4),
        ("per_example", tokens_of_examples, 1),
    ],
)
def test_truth_with_masks(probe, count, accumulate):
    data = sentences()
    callback = measure(data, 32 // accumulate, accumulate, 400, probe=probe, batch_size_fn=count)
    gradients = per_token_gradients(data)[data.tensors[2] > 0]
    expected = truth(gradients)
    estimate = callback.estimate()
    moments = PairMoments.from_list(callback._measurements[0].metric.moments[0].tolist())
    var_x, _, var_y = moments.covariance_of_means()
    assert (estimate.unit, estimate.num_measurements) == ("tokens", 400)
    assert abs(estimate.grad_sq_norm - expected[0]) < 3 * var_x**0.5 < 0.05 * expected[0]
    assert abs(estimate.cov_trace - expected[1]) < 3 * var_y**0.5 < 0.06 * expected[1]
    assert estimate.batch_size == pytest.approx(32 * float(data.tensors[2].sum()) / 512, rel=0.5)


def test_examples_weigh_as_many_tokens_as_they_have():
    """One step, each example a mean over its own tokens; the masked one counts nothing."""
    data = sentences(24)
    gradients, counts = per_token_gradients(data), data.tensors[2].sum(1)
    counted = counts > 0
    own = gradients.sum(1)[counted] / counts[counted, None]
    weights = counts[counted] / counts.sum()
    sample = float(weights @ own.square().sum(1))
    mean = float((weights[:, None] * own).sum(0).square().sum())
    inverse = float((weights / counts[counted]).sum()), float((weights**2 / counts[counted]).sum())
    expected = solve_noise_scale(sample, mean, *inverse)
    callback = measure(data, 24, 1, 1, shuffle=False, probe="per_example", batch_size_fn=tokens_of_examples)
    estimate = callback.estimate()
    assert estimate.batch_size == float(counts.sum())
    assert (estimate.grad_sq_norm, estimate.cov_trace) == pytest.approx(expected, rel=1e-9)


def test_a_batch_of_one_example_with_tokens_carries_no_information():
    data = TensorDataset(*(tensor[[3, 3, 7, 3]] for tensor in sentences(24).tensors))
    callback = measure(data, 4, 1, 2, probe="per_example", batch_size_fn=tokens_of_examples)
    assert callback._measurements[0].metric.rejected[Rejection.SINGLE_SAMPLE] == 2


def test_one_number_of_tokens_does_not_tell_the_examples_apart():
    with pytest.raises(ValueError, match=r"a tensor with what each example counts, as its tokens, `mask.sum\(1\)`"):
        measure(sentences(64), 16, 1, 1, probe="per_example", batch_size_fn=tokens_of_batch)
