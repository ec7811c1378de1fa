"""Parameters that a loss uses itself, outside any module's forward: they meet the batch element by element."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.per_example_reference import check, measure, mixed_loss
from torch import nn

from lightning_wn.per_example import PerExampleError

BATCH, WIDTH = 6, 5


class Model(nn.Module):
    """A network and a parameter that stands beside it."""

    def __init__(self, shape=(WIDTH,), width=WIDTH):
        super().__init__()
        self.net = nn.Linear(3, width, dtype=torch.float64)
        self.own = nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)


def counts(y):
    return torch.poisson(torch.full_like(y, 3.0))


def learned_variance(m, y):
    return ((y.square() / m.own.exp()) + m.own).sum(1)


def log_variance_twice(m, y):
    return F.gaussian_nll_loss(y, counts(y), F.softplus(m.own).expand_as(y), reduction="none").sum(1)


def temperature(m, y):
    return F.cross_entropy(y * m.own.exp(), torch.arange(len(y)) % WIDTH, reduction="none")


def dispersion(m, y):
    """Negative binomial with one dispersion a gene, as single-cell models have it."""
    theta, mu, x = m.own.exp(), F.softplus(y), counts(y)
    mixed = (theta + mu).log()
    return -(theta * (theta.log() - mixed) + x * (mu.log() - mixed) + torch.lgamma(x + theta)
             - torch.lgamma(theta) - torch.lgamma(x + 1)).sum(1)  # fmt: skip


def threshold(m, y):
    return mixed_loss(torch.where(y > 0, y * m.own, m.own))


def upper_bound(m, y):
    return mixed_loss(torch.minimum(y, m.own) + torch.maximum(y, -m.own))


def power(m, y):
    return mixed_loss(y.abs() ** m.own)


def mixture(m, y):
    return mixed_loss(y * m.own.softmax(0))


def prototypes(m, y):
    """Distances to rows of a table: (B, 1, W) - (K, W)."""
    return torch.logsumexp(-(y.unsqueeze(1) - m.own).square().sum(2), 1)


CASES = {
    learned_variance: (WIDTH,), log_variance_twice: (WIDTH,), temperature: (), dispersion: (WIDTH,),
    threshold: (WIDTH,), upper_bound: (WIDTH,), power: (WIDTH,), mixture: (WIDTH,), prototypes: (4, WIDTH),
}  # fmt: skip


@pytest.mark.parametrize("loss", CASES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("batch", [BATCH, WIDTH], ids=["", "as many examples as features"])
def test_exact(loss, batch):
    torch.manual_seed(0)
    model, x = Model(CASES[loss]), torch.randn(batch, 3, dtype=torch.float64)

    def run():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return loss(model, model.net(x))

    check(model, run, batch)


def test_a_factor_on_the_mean_is_refused():
    """Where the batch is reduced already, no example's share can be told."""
    torch.manual_seed(0)
    model, x = Model(()), torch.randn(BATCH, 3, dtype=torch.float64)

    def run():
        return (model.net(x).square().sum(1).mean() * model.own.exp()).reshape(1)

    with pytest.raises(
        PerExampleError, match="parameter 'own' enters the loss past every module's forward, and not by"
    ):
        measure(model, list(model.parameters()), run, BATCH)


def test_a_factor_on_the_mean_beside_another_use():
    torch.manual_seed(0)
    model, x = Model(()), torch.randn(BATCH, 3, dtype=torch.float64)

    def run():
        y = model.net(x) * model.own
        return (y.square().sum(1).mean() * model.own.exp()).reshape(1)

    with pytest.raises(PerExampleError, match="parameter 'own' enters the loss past every module's forward"):
        measure(model, list(model.parameters()), run, BATCH)
