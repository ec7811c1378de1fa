"""The callback as it comes, on models as people bring them: no run ends, and each number is exact.

What is exact depends on where samples come from. By ``per_example`` it is the spread within each batch, of the
gradients of its examples alone; by ``batch_pair`` the spread between each batch and the one before. Both are computed
here by autograd, at the weights that stand still.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET
from helpers.real_models import CASES, GAN, STEPS
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback


def flat_gradient(loss, parameters):
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, parameters, strict=True)]
    ).double()


def losses_of(model):
    """The loss of each optimizer, and the parameters that it moves."""
    if isinstance(model, GAN):
        return [(model.generator_loss, model.generator), (model.discriminator_loss, model.discriminator)]
    return [(lambda batch: model.training_step(batch, 0), model)]


def within_batches(loss, parameters, case):
    """Mean |G|² and tr(Σ) of the batches, from the gradients of single examples."""
    pairs = []
    for batch in case.batches:
        count = len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])
        g = torch.stack([flat_gradient(loss(case.cut(batch, index)), parameters) for index in range(count)])
        spread = g.var(0).sum()
        pairs.append(torch.stack((g.mean(0).square().sum() - spread / count, spread)))
    return torch.stack(pairs).mean(0).tolist()


def between_batches(loss, parameters, case, count, size):
    """The same from the last pairs of successive batches: |G|² is their product, tr(Σ) half their squared distance."""
    g = [flat_gradient(loss(batch), parameters) for batch in case.batches][-count - 1 :]
    pairs = [torch.stack((a @ b, size * (a - b).square().sum() / 2)) for a, b in pairwise(g)]
    return torch.stack(pairs).mean(0).tolist()


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_model_as_it_comes(make):
    torch.manual_seed(0)
    case = make()
    frozen = copy.deepcopy(case.model).train()
    own = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0)
    trainer = L.Trainer(callbacks=[own], **QUIET, max_epochs=1)
    torch.manual_seed(1)  # what draws numbers in its training step draws them again below
    trainer.fit(case.model, DataLoader(case.batches, batch_size=None))
    assert trainer.num_training_batches == STEPS
    assert trainer.global_step == STEPS * len(trainer.optimizers)
    torch.manual_seed(1)
    for index, (loss, part) in enumerate(losses_of(frozen)):
        estimate = own.estimate(index)
        parameters = list(part.parameters())
        assert not estimate.approximate
        assert estimate.num_measurements > 0
        if estimate.probe == "per_example":
            truth = within_batches(loss, parameters, case)
        else:
            assert estimate.probe == "batch_pair"
            if make.__name__ in ("vit", "convnext"):
                continue  # each look at a batch mixes it anew
            truth = between_batches(loss, parameters, case, estimate.num_measurements, estimate.batch_size)
        # float32 gradients
        assert [estimate.grad_sq_norm, estimate.cov_trace] == pytest.approx(truth, rel=1e-3, abs=1e-6 * truth[1])
