"""The probe looks for mixing on the batch of its first measured step, without a trace in training."""

import random

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.frozen_digits import QUIET
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.per_example.mixing import search
from lightning_wn.probes.checks import mixing as mixing_check


class Classifier(L.LightningModule):
    def __init__(self, middle=None, dropout=0.2):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), middle or nn.Identity(), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def data():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(32, 4, generator=generator), torch.randint(0, 3, (32,), generator=generator)), 8
    )


def fit(model, *, steps=4, measure=True, loader=None, **trainer):
    callback = GradientNoiseScaleCallback("per_example", every_n_steps=1)
    settings = QUIET | {"max_steps": steps} | trainer
    L.Trainer(callbacks=[callback] if measure else [], **settings).fit(model, loader or data())
    return callback


def make(kind=Classifier, *args, **kwargs):
    torch.manual_seed(0)
    return kind(*args, **kwargs)


def test_mixing_is_refused_with_the_module_and_the_cause():
    with pytest.raises(
        ValueError, match=r"examples mix.*what goes into 'head' \(Linear\) depends on the other examples"
    ):
        fit(make(Classifier, Centred()))


def test_nothing_is_said_where_examples_are_apart():
    estimate = fit(make()).estimate()
    assert (estimate.num_measurements, estimate.unchecked) == (4, "")
    assert "mixing" not in str(estimate)


def test_training_is_the_same_bit_for_bit():
    """With dropout, and with random numbers of Python and numpy drawn in the step."""

    class Drawing(Classifier):
        def training_step(self, batch, batch_idx):
            scale = random.random() + np.random.rand()
            return super().training_step(batch, batch_idx) * scale

    ends = []
    for measure in (False, True):
        random.seed(0)
        np.random.seed(0)
        model = make(Drawing)
        fit(model, measure=measure)
        ends.append((model.state_dict(), random.random(), np.random.rand(), torch.rand(1)))
    (weights, *numbers), (same_weights, *same_numbers) = ends
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), same_weights.values(), strict=True))
    assert numbers == same_numbers


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_users_hooks_fire_as_often_as_without(kind):
    counts = []
    for measure in (False, True):
        model, calls = make(), []

        def note(*args, calls=calls):
            calls.append(1)

        handle = getattr(model.head, f"register_{kind}_hook")(note)
        callback = fit(model, measure=measure)
        handle.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    # what a forward hook would change is not known on a copy without it
    unknown = "forward hooks on 'head' may change what the model computes, and are called in training only"
    assert callback.estimate().unchecked == (unknown if kind.startswith("forward") else "")


def test_hooks_on_all_modules_do_not_see_the_copies():
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: calls.append(1))
    try:
        report = search.find_mixing(nn.Linear(4, 2), lambda net, x: net(x).square().mean(), torch.randn(4, 4), 4)
    finally:
        handle.remove()
    assert report.outcome is search.Mixing.SEPARATE
    assert not calls


def test_logs_of_the_copies_go_nowhere(tmp_path):
    class Writing(Classifier):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"own": 1.0}, step=len(self.logger.experiment.metrics))
            return super().training_step(batch, batch_idx)

    rows = []
    for measure in (False, True):
        logger = CSVLogger(tmp_path, name=str(measure))
        fit(make(Writing), measure=measure, logger=logger, log_every_n_steps=100)
        rows.append([row for row in logger.experiment.metrics if "own" in row])
    assert len(rows[0]) == len(rows[1])


def test_running_out_of_memory_skips_the_look(monkeypatch):
    def run_out(*args):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(search, "take_reference", run_out)
    estimate = fit(make()).estimate()
    assert estimate.num_measurements == 4
    assert "examples could not be checked for mixing: there is not enough memory for another pass" in str(estimate)


def test_what_cannot_be_looked_at_is_said_in_the_advice():
    class InPlace(Classifier):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(2.0)
            return super().training_step(batch, batch_idx)

    callback = fit(make(InPlace))
    assert callback.estimate().unchecked == "`training_step` changes its batch in place"
    assert any("could not be checked for mixing" in doubt for doubt in callback.advise().doubts)


def test_a_model_that_cannot_be_copied():
    class Single(Classifier):
        def __deepcopy__(self, memo):
            raise TypeError("there is only one")

    estimate = fit(make(Single)).estimate()
    assert estimate.unchecked == "the model failed on a copy of itself (TypeError: there is only one)"
    assert estimate.num_measurements == 4


def test_a_copy_that_computes_with_the_original():
    """A function made in `__init__` holds the original; a backward pass would add to its gradients."""

    class Bound(Classifier):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.compute = lambda x: self.head(self.body(x))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.compute(batch[0]), batch[1])

    models = make(Bound), make(Bound)
    fit(models[0], measure=False)
    estimate = fit(models[1]).estimate()
    assert estimate.unchecked == "a copy of the model computes with the weights of the original"
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mixing", [False, True])
def test_manual_optimization(mixing):
    class Manual(Classifier):
        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    model = make(Manual, Centred() if mixing else None)
    if mixing:
        with pytest.raises(ValueError, match="examples mix"):
            fit(model)
    else:
        assert fit(model).estimate().unchecked == ""


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precisions(precision):
    loader = data() if precision == "bf16-mixed" else DataLoader(
        TensorDataset(*(t.to(torch.float64 if "64" in precision else torch.bfloat16) if t.is_floating_point() else t
                        for t in data().dataset.tensors)), 8)  # fmt: skip
    assert fit(make(), precision=precision, loader=loader).estimate().unchecked == ""
    with pytest.raises(ValueError, match="examples mix"):
        fit(make(Classifier, Centred()), precision=precision, loader=loader)


def test_a_batch_that_training_step_empties():
    class Popping(Classifier):
        def training_step(self, batch, batch_idx):
            y = batch.pop("y")
            return super().training_step((batch["x"], y), batch_idx)

    loader = DataLoader([{"x": x, "y": y} for x, y in data().dataset], 8)
    assert fit(make(Popping), loader=loader).estimate().unchecked == ""


def test_positions_in_a_table_that_looks_like_a_batch():
    """T x T relative positions behind `masked_fill`, with T == B: all examples share them, and it is exact."""

    class Relative(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(16, 1)
            self.qk, self.head = nn.Linear(4, 8), nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            x, y = batch
            n = x.shape[1]
            q, k = self.qk(x).chunk(2, -1)
            bias = self.table(torch.arange(n)[:, None] - torch.arange(n)[None] + n)[..., 0]
            bias = bias.masked_fill(torch.ones(n, n).triu(1).bool(), -1e9)
            o = self.head((q @ k.transpose(1, 2) + bias).softmax(-1) @ x)
            return F.cross_entropy(o.flatten(0, 1), y.flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 8, 4, generator=generator), torch.randint(0, 3, (16, 8), generator=generator)
    model = make(Relative)
    callback = fit(model, loader=DataLoader(TensorDataset(x[:8], y[:8]), 8), steps=1)
    fresh = make(Relative)
    rows = [
        torch.autograd.grad(fresh.training_step((x[i : i + 1], y[i : i + 1]), 0), list(fresh.parameters()))
        for i in range(8)
    ]
    spread = torch.stack([torch.cat([g.flatten() for g in row]).double() for row in rows]).var(0).sum()
    # float32 gradients
    assert callback.estimate().cov_trace == pytest.approx(float(spread), rel=1e-4)


def test_looks_have_an_end(monkeypatch):
    """One for each way in which layers are used, up to a number."""

    class Varying(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for _ in range(batch_idx):
                loss = loss + self.body(batch[0]).square().mean()
            return loss

    looks = []
    look = mixing_check.find_mixing
    monkeypatch.setattr(mixing_check, "MAX_CHECKS", 2)
    monkeypatch.setattr(mixing_check, "find_mixing", lambda *args, **kwargs: looks.append(1) or look(*args, **kwargs))
    callback = fit(make(Varying))
    assert len(looks) == 2
    assert callback.estimate().unchecked == "the model uses its layers in more than 2 ways"


def test_an_example_alone_in_its_batch_mixes_with_none():
    report = search.find_mixing(nn.Linear(4, 2), lambda net, x: net(x).std(0).sum(), torch.randn(1, 4), 1)
    assert report.outcome is search.Mixing.SEPARATE


def test_no_rows_to_look_at():
    report = search.find_mixing(nn.Linear(4, 2), lambda net, x: net(x.T).square().mean(), torch.randn(4, 6), 4)
    assert report.outcome is search.Mixing.UNKNOWN
    assert report.why == "no layer gives a tensor with 4 rows, one an example"
