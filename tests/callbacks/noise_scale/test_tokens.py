"""The noise scale in tokens: losses over unmasked tokens, against every sequence's own gradient."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.noise_scale.parts import PartMoments
from lightning_wn.noise_scale.samples import Rejection
from lightning_wn.noise_scale.statistics import solve_noise_scale

LENGTH = 12


def sentences(count=512, share=0.0):
    """Sequences whose tokens share so much of their variance, cut to lengths of their own; example 3 is masked out."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, LENGTH, 5, generator=generator, dtype=torch.float64)
    x = share**0.5 * torch.randn(count, 1, 5, generator=generator, dtype=torch.float64) + (1 - share) ** 0.5 * x
    error = torch.randn(count, LENGTH, generator=generator, dtype=torch.float64)
    y = x.sum(2) + error
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


def own_gradients(data):
    """Tokens of each sequence that has any, and their mean gradient: shapes (n,) and (n, parameters)."""
    x, y, mask = data.tensors
    model = TokenModel()
    slope = 2 * (model.layer(x).squeeze(2) - y).detach() * mask
    sums = torch.cat((slope[..., None] * x, slope[..., None]), dim=2).sum(1)
    counts = mask.sum(1)
    return counts[counts > 0], sums[counts > 0] / counts[counts > 0, None]


def truth(data, samples, sequences, *, by_tokens):
    """|G|² and n V by brute force over windows of ``samples`` micro-batches of ``sequences`` each."""
    counts, own = own_gradients(data)
    drawn = torch.randint(len(counts), (40_000, samples, sequences), generator=torch.Generator().manual_seed(3))
    n, sums = counts[drawn].sum(2), (counts[:, None] * own)[drawn].sum(2)
    means = sums.sum(1) / n.sum(1)[:, None] if by_tokens else (sums / n[..., None]).mean(1)
    centre = means.mean(0)
    return float(centre @ centre), float(n.sum(1).mean() * (means - centre).square().sum(1).mean())


def tokens_of_batch(batch):
    return batch[2].sum()


def tokens_of_examples(batch):
    return batch[2].sum(1)


def measure(data, batch_size, accumulate, steps, shuffle=True, model=TokenModel, **arguments):
    callback = GradientNoiseScaleCallback(**({"every_n_steps": 1, "ema_decay": 1.0, "unit": "tokens"} | arguments))
    settings = QUIET | {"max_steps": steps, "accumulate_grad_batches": accumulate}
    generator = torch.Generator().manual_seed(1)
    sampler = None
    if shuffle:  # with replacement, so that steps are independent
        sampler = RandomSampler(
            data, replacement=True, num_samples=batch_size * accumulate * steps, generator=generator
        )
    loader = DataLoader(data, batch_size, sampler=sampler)
    L.Trainer(callbacks=[callback], **settings).fit(model(), loader)
    return callback


def assert_true(callback, expected):
    """Within three standard errors, which are themselves below 5 and 3 %."""
    estimate = callback.estimate()
    moments = PartMoments.from_list(callback._measurements[0].metric.moments[0].tolist())
    var_x, _, var_y = moments.covariance_of_means()
    assert abs(estimate.grad_sq_norm - expected[0]) < 3 * var_x**0.5 < 3 * 0.05 * expected[0]
    assert abs(estimate.cov_trace - expected[1]) < 3 * var_y**0.5 < 3 * 0.03 * expected[1]


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize(
    ("probe", "count", "accumulate"),
    [
        ("micro_batch", tokens_of_batch, 4),
        ("micro_batch", tokens_of_examples, 4),
        ("per_example", tokens_of_examples, 1),
    ],
)
def test_truth_with_masks(probe, count, accumulate, share):
    data = sentences(share=share)
    callback = measure(data, 16 // accumulate, accumulate, 800, probe=probe, batch_size_fn=count)
    assert callback.estimate().num_measurements == 800
    assert callback.estimate().unit == "tokens"
    sequences = 16 // accumulate if probe == "micro_batch" else 1
    assert_true(callback, truth(data, 16 // sequences, sequences, by_tokens=probe == "per_example"))
    assert callback.estimate().batch_size == pytest.approx(16 * float(data.tensors[2].sum()) / 512, rel=0.02)


class WindowModel(TokenModel):
    """The sum over the micro-batch over the tokens of its window, whose batches come in the order of the data."""

    def training_step(self, batch, batch_idx):
        x, y, mask = batch
        accumulate = self.trainer.accumulate_grad_batches
        first = batch_idx // accumulate * accumulate
        window = self.trainer.train_dataloader.dataset.tensors[2][2 * first : 2 * (first + accumulate)]
        return ((self.layer(x).squeeze(2) - y).square() * mask).sum() * accumulate / window.sum()


class SumModel(TokenModel):
    """The sum over the micro-batch."""

    def training_step(self, batch, batch_idx):
        x, y, mask = batch
        return ((self.layer(x).squeeze(2) - y).square() * mask).sum()


@pytest.mark.parametrize("probe", ["micro_batch", "consecutive"])
@pytest.mark.parametrize(("model", "told"), [(WindowModel, "window"), (WindowModel, "auto"), (SumModel, "sum")])
def test_losses_that_are_no_means_over_micro_batches(model, told, probe):
    """Two sequences a micro-batch, each loader's pass in order: independent draws are data of their own."""
    if probe == "consecutive" and told == "auto":
        pytest.skip("one gradient a step tells nothing of micro-batches")
    pool, steps, accumulate = sentences(share=0.6), 1000, 6
    drawn = torch.randint(512, (2 * accumulate * steps,), generator=torch.Generator().manual_seed(4))
    data = TensorDataset(*(tensor[drawn] for tensor in pool.tensors))
    arguments = {"probe": probe, "batch_size_fn": tokens_of_examples, "loss_mean_over": told}
    callback = measure(data, 2, accumulate, steps, shuffle=False, model=model, **arguments)
    expected = truth(pool, accumulate, 2, by_tokens=True)
    if probe == "consecutive":  # two steps' mean is what varies
        estimate = callback.estimate()
        assert estimate.grad_sq_norm == pytest.approx(expected[0], rel=0.15)
        assert estimate.cov_trace == pytest.approx(expected[1], rel=0.15)
    else:
        assert_true(callback, expected)
    assert callback.estimate().batch_size == pytest.approx(float(data.tensors[2].sum()) / steps, rel=1e-3)


def test_examples_under_a_loss_over_the_window():
    """Micro-batches of 3 and 1 examples: the two equations with weights 3/4 and 1/4."""
    data = TensorDataset(*(tensor[4:12] for tensor in sentences().tensors))
    counts, own = own_gradients(data)
    sums = counts[:, None] * own

    class Model(TokenModel):
        def training_step(self, batch, batch_idx):
            x, y, mask = batch
            return ((self.layer(x).squeeze(2) - y).square() * mask).sum() * 2 / 4

    callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0, loss_mean_over="window")
    batches = [[0, 1, 2], [3], [4], [5, 6, 7]]
    settings = QUIET | {"max_steps": 2, "accumulate_grad_batches": 2}
    L.Trainer(callbacks=[callback], **settings).fit(Model(), DataLoader(data, batch_sampler=batches))
    pairs = []
    for first, second in (([0, 1, 2], [3]), ([4], [5, 6, 7])):
        samples = torch.stack([sums[first].mean(0), sums[second].mean(0)])
        sizes = torch.tensor([len(first), len(second)], dtype=torch.float64)
        w = sizes / 4
        mean = (w[:, None] * samples).sum(0)
        pairs.append(
            solve_noise_scale(float(w @ samples.square().sum(1)), float(mean @ mean), float((w / sizes).sum()), 1 / 4)
        )
    found = callback.estimate()
    assert (found.grad_sq_norm, found.cov_trace) == pytest.approx(
        tuple((a + b) / 2 for a, b in zip(*pairs, strict=True)), rel=1e-9
    )


def test_examples_weigh_as_many_tokens_as_they_have():
    """One step, each example a mean over its own tokens; the masked one counts nothing."""
    data = sentences(24)
    counts, own = own_gradients(data)
    w = counts / counts.sum()
    mean = (w[:, None] * own).sum(0)
    pairs = float(mean @ mean - w.square() @ own.square().sum(1)) / float(1 - w @ w)
    callback = measure(data, 24, 1, 1, shuffle=False, probe="per_example", batch_size_fn=tokens_of_examples)
    estimate = callback.estimate()
    assert estimate.batch_size == float(counts.sum())
    expected = (pairs, float(counts.sum()) * (float(mean @ mean) - pairs))
    assert (estimate.grad_sq_norm, estimate.cov_trace) == pytest.approx(expected, rel=1e-9)


def test_a_batch_of_one_example_with_tokens_carries_no_information():
    data = TensorDataset(*(tensor[[3, 3, 7, 3]] for tensor in sentences(24).tensors))
    callback = measure(data, 4, 1, 2, shuffle=False, probe="per_example", batch_size_fn=tokens_of_examples)
    assert callback._measurements[0].metric.rejected[Rejection.SINGLE_SAMPLE] == 2


def test_one_number_of_tokens_does_not_tell_the_examples_apart():
    with pytest.raises(ValueError, match=r"a tensor with what each example counts, as its tokens, `mask.sum\(1\)`"):
        measure(sentences(64), 16, 1, 1, probe="per_example", batch_size_fn=tokens_of_batch)
