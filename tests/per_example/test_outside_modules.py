"""Parameters that no layer's forward uses: in the loss, beside the batch, or alone; exact, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from helpers.per_example_reference import brute_force, measure
from torch import nn

from lightning_wn.per_example import PerExampleError

B = 5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.table = nn.Embedding(9, 3)
        self.own = nn.Parameter(torch.randn(3) * 0.3)
        self.scale = nn.Parameter(torch.tensor(0.2))
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.list = nn.ParameterList([nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))])
        self.double()


def batch():
    torch.manual_seed(1)
    return torch.randn(B, 4).double(), torch.randn(B, 3).double(), torch.randint(9, (B, 2))


def gaussian(m, x, y, t):
    return ((y - m.net(x)).square() / m.own.exp() + m.own).sum(1)


def temperature(m, x, y, t):
    return F.cross_entropy(m.net(x) * m.scale.exp(), y.argmax(1), reduction="none")


def negative_binomial(m, x, y, t):
    mu, counts, theta = m.net(x).exp(), y.abs().round(), m.own.exp()
    log_both = (theta + mu).log()
    terms = theta * (theta.log() - log_both) + counts * (mu.log() - log_both)
    return -(terms + (counts + theta).lgamma() - theta.lgamma()).sum(1)


def power(m, x, y, t):
    return ((m.net(x).abs() + 0.1) ** m.own.sigmoid()).sum(1) + torch.maximum(m.net(x), m.own).sum(1)


def where(m, x, y, t):
    return torch.where(y > 0, m.net(x), m.own * m.scale).square().sum(1)


def product(m, x, y, t):
    return (m.net(x) + x @ m.matrix).sin().sum(1) + F.linear(x, m.list[0], m.list[1]).cos().sum(1)


def positions(m, x, y, t):
    return (torch.stack([x, x.sin()], 1) @ m.matrix).square().sum((1, 2)) + m.net(x).sum(1)


OUTSIDE = [gaussian, temperature, negative_binomial, power, where, product, positions]


def check(losses, penalty=None, **options):
    model = Model()
    data = batch()
    loss = losses(model, *data).mean() + (0.0 if penalty is None else penalty(model))
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    used = [p for p, g in zip(model.parameters(), grads, strict=True) if g is not None]

    def run():
        own = losses(model, *data)
        return own if penalty is None else Sum(own, penalty(model))

    measured, _ = measure(model, used, run, B, steps=2, **options)
    own = losses(model, *data)
    expected = brute_force(used, (own if penalty is None else own + penalty(model)) / B)
    # sums of a few dozen products in float64
    torch.testing.assert_close(measured.double(), expected, rtol=1e-9, atol=1e-30)


class Sum:
    """What `measure` takes the mean of: losses, and a term that no example has to itself."""

    def __init__(self, losses, term):
        self.losses, self.term = losses, term

    def mean(self):
        return self.losses.mean() + self.term


@pytest.mark.parametrize("losses", OUTSIDE, ids=lambda f: f.__name__)
def test_meets_the_batch_outside_of_any_module(losses):
    check(losses)


PENALTIES = {
    "l1": lambda m: 1e-2 * sum(p.abs().sum() for p in m.parameters()),
    "l2": lambda m: sum(0.5 * p.pow(2).sum() for p in m.net.parameters()) * 0.1,
    "norms": lambda m: m.net[0].weight.norm() + torch.linalg.vector_norm(m.net[2].weight) / 3,
    "stacked": lambda m: torch.stack([p.norm() for p in m.net.parameters()]).sum(),
    "whole": lambda m: 2 * torch.cat([p.flatten() for p in m.net.parameters()]).norm(),
    "products": lambda m: (m.net[2].weight @ m.net[0].weight).square().mean() - (m.own * m.own).sum(),
    "gram": lambda m: (m.net[0].weight @ m.net[0].weight.T).pow(2).sum().sqrt(),
    "of_a_table": lambda m: m.table.weight.square().sum(),
    "negative": lambda m: -(m.scale.exp() * 3 + m.own.softmax(0).max()),
}


def with_table(m, x, y, t):
    return gaussian(m, x, y, t) + m.table(t).sin().sum((1, 2))


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_a_penalty_adds_the_same_to_every_example(penalty):
    check(with_table, PENALTIES[penalty])


UNKNOWN = {
    "data_as_factor": (gaussian, lambda m: m.net[0].weight.square().sum() * batch()[0].mean()),
    "data_inside": (gaussian, lambda m: (m.net[0].weight - batch()[0].mean()).square().sum()),
}


@pytest.mark.parametrize("kind", UNKNOWN, ids=str)
def test_what_may_hold_data_is_no_penalty(kind):
    with pytest.raises(PerExampleError, match="does not account for"):
        check(*UNKNOWN[kind])


def test_learned_weights_of_losses_are_refused_by_name():
    """Where the parameter meets a loss, the examples are added up already."""

    class Weighted:
        def __init__(self, m, x, y, t):
            self.m, self.losses = m, [(m.net(x) - y).square().sum(1), m.net(x).abs().sum(1)]

        def mean(self):
            return sum((-s).exp() * own.mean() + s for s, own in zip(self.m.own, self.losses, strict=False))

    model = Model()
    with pytest.raises(PerExampleError, match="parameter 'own' enters the loss past every module's forward"):
        measure(model, [*model.net.parameters(), model.own], lambda: Weighted(model, *batch()), B)
