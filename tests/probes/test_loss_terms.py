"""The terms of a loss over all data: exact beside autograd, and what has no terms of its own is passed over."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.frozen_digits import QUIET
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.probes import loss_terms

NODES = 30


class Graph(L.LightningModule):
    """Two rounds of message passing over one graph, of which some nodes have labels."""

    def __init__(self, loss="mean", norm=None, lr=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.norm = norm or nn.Identity()
        self.loss, self.lr = loss, lr

    def terms(self, batch):
        x, adjacency, labels, known = batch
        hidden = self.norm(adjacency @ self.first(x)).relu()
        return (adjacency @ self.second(hidden))[known], labels[known]

    def training_step(self, batch, batch_idx):
        out, labels = self.terms(batch)
        if self.loss == "mean":
            return F.cross_entropy(out, labels)
        if self.loss == "by hand":
            return 0.5 * F.cross_entropy(out, labels, reduction="none").sum() / len(labels)
        if self.loss == "squares":
            return F.mse_loss(out, F.one_hot(labels, 3).float())
        return F.cross_entropy(out, labels) + 0.01 * self.first.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def graph():
    g = torch.Generator().manual_seed(1)
    adjacency = (torch.rand(NODES, NODES, generator=g) < 0.1).float() + torch.eye(NODES)
    x, labels = torch.randn(NODES, 4, generator=g), torch.randint(0, 3, (NODES,), generator=g)
    return x, adjacency / adjacency.sum(1, keepdim=True), labels, torch.arange(0, NODES, 2)


def fit(model, steps=3, **arguments):
    own = GradientNoiseScaleCallback(
        **({"every_n_steps": 1, "ema_decay": 1.0, "unit": "nodes", "batch_size_fn": lambda b: len(b[3])} | arguments)
    )
    data = DataLoader([graph()], batch_size=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        L.Trainer(callbacks=[own], **QUIET, max_epochs=steps).fit(model, data)
    return own.estimate(), [str(w.message) for w in caught if "GradientNoiseScaleCallback" in str(w.message)]


def brute_force(model):
    """|G|² and tr(Σ) of the terms' own gradients."""
    model, rows = model.double(), []
    x, adjacency, labels, known = graph()
    for index in range(len(known)):
        out, targets = model.terms((x.double(), adjacency.double(), labels, known))
        one = slice(index, index + 1)
        if model.loss == "squares":
            loss = F.mse_loss(out[one], F.one_hot(targets[one], 3).double())
        else:
            loss = F.cross_entropy(out[one], targets[one]) * (0.5 if model.loss == "by hand" else 1.0)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(rows)
    spread = float(g.var(0).sum())
    return float(g.mean(0).square().sum()) - spread / len(g), spread


@pytest.mark.parametrize("loss", ["mean", "by hand", "squares"])
@pytest.mark.parametrize("probe", ["loss_terms", "auto"])
def test_exact(probe, loss):
    estimate, said = fit(Graph(loss), steps=5, probe=probe)
    assert (estimate.probe, estimate.num_measurements) == ("loss_terms", 5 if probe == "loss_terms" else 4)
    assert estimate.repeated
    # float32 gradients
    assert (estimate.grad_sq_norm, estimate.cov_trace) == pytest.approx(brute_force(Graph(loss)), rel=1e-4)
    assert bool(said) == (probe == "auto")


def test_some_terms_stand_for_all(monkeypatch):
    monkeypatch.setattr(loss_terms, "_MOST_TERMS", 5)
    estimate, _ = fit(Graph(), steps=120, probe="loss_terms")
    _, spread = brute_force(Graph())
    # 600 draws of squared norms that differ by about as much as they are large: 4 % is one standard error
    assert estimate.cov_trace == pytest.approx(spread, rel=0.12)


def test_training_is_the_same_bit_for_bit():
    states = []
    for callbacks in (
        [],
        [GradientNoiseScaleCallback("loss_terms", every_n_steps=1, batch_size_fn=lambda b: len(b[3]))],
    ):
        model = Graph(lr=0.1)
        model.norm = nn.Dropout(0.2)
        torch.manual_seed(3)
        L.Trainer(callbacks=callbacks, **QUIET, max_epochs=4).fit(model, DataLoader([graph()], batch_size=None))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        (lambda: Graph("penalty"), {}, "the loss is no plain mean or sum of terms"),
        (lambda: Graph(norm=nn.BatchNorm1d(8)), {}, "'norm' makes use of batch statistics, which fewer terms"),
        (Graph, {"batch_size_fn": lambda b: NODES}, "the loss has 15 terms and a batch counts 30; let `batch_size_fn`"),
    ],
)
def test_what_has_no_terms(model, arguments, sentence):
    with pytest.raises(ValueError, match=f"`probe='loss_terms'`: {sentence}"):
        fit(model(), probe="loss_terms", **arguments)
    estimate, said = fit(model(), steps=6, **arguments)
    assert estimate.num_measurements == 0
    assert any(sentence in line for line in said)


def test_no_memory_ends_no_run(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loss_terms, "SilentCopy", full)
    estimate, said = fit(Graph(), steps=6)
    assert estimate.num_measurements == 0
    assert any("no memory left for a copy of the model and its loss" in line for line in said)
