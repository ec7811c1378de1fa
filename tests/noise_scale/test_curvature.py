"""The curvature-weighted noise scale against Hessians written out, and that training does not notice it."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader, per_example_gradients
from torch import nn
from torch.func import functional_call, hessian
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_wn import GradientNoiseScale, GradientNoiseScaleCallback, measure_noise_scale
from lightning_wn.noise_scale.curvature import curvature_samples
from lightning_wn.noise_scale.samples import GradientSamples, measurement_from_row


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_products_with_the_hessian_are_exact():
    net = small_net()
    parameters = list(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    batches = [(torch.randn(n, 6).double(), torch.randint(0, 3, (n,))) for n in (7, 4, 4, 2)]

    def loss(batch):
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    def of_vector(vector, batch):
        parts = dict(zip(names, vector.split([p.numel() for p in parameters]), strict=True))
        shaped = {name: parts[name].view_as(p) for name, p in net.named_parameters()}
        return nn.functional.cross_entropy(functional_call(net, shaped, (batch[0],)), batch[1])

    flat = torch.cat([p.detach().flatten() for p in parameters])
    curvature = hessian(of_vector)(flat, batches[0])
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss(b), parameters)]) for b in batches[1:]]
    losses = [(lambda b=b: loss(b), len(b[1])) for b in batches]
    found = curvature_samples(parameters, losses[0][0], losses[1:])
    mean = torch.stack(gradients).mean(0)
    torch.testing.assert_close(found.sq_norms, torch.stack([g @ curvature @ g for g in gradients]), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.grad_sq_norm, mean @ curvature @ mean, rtol=1e-10, atol=0)
    # the two equations, solved by hand
    small, big = float(found.sq_norms.mean()), float(found.grad_sq_norm)
    inverse, inverse_of_mean = (1 / 4 + 1 / 4 + 1 / 2) / 3, (1 / 4 + 1 / 4 + 1 / 2) / 9
    ((grad_form, cov_form),) = measurement_from_row(found.to_row().tolist(), 0.01).pairs
    assert cov_form == pytest.approx((small - big) / (inverse - inverse_of_mean), rel=1e-10)
    assert grad_form == pytest.approx(big - inverse_of_mean * cov_form, rel=1e-10)


class Bowl(L.LightningModule):
    """½ (w - x)ᵀ A (w - x): each example's gradient is A (w - x), and the Hessian is A."""

    def __init__(self):
        super().__init__()
        self.register_buffer("diagonal", torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64))
        self.weight = nn.Parameter(torch.tensor([2.0, -0.2, 2.0], dtype=torch.float64))
        self.seen = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = (self.diagonal * (self.weight - batch[0]).square()).sum(1).mean() / 2
        self.seen.update(loss.detach())
        self.log("loss", loss)
        return {"loss": loss + 0.0 * torch.rand(()) + 0.0 * self.trainer.current_epoch}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def bowl_data(count=8000):
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(count, 3, generator=generator, dtype=torch.float64))


def bowl_truth():
    """GᵀHG and tr(HΣ) with Cov[x] = 1 and E[x] = 0."""
    model = Bowl()
    mean = model.diagonal * model.weight.detach()
    return float(mean @ (model.diagonal * mean)), float(model.diagonal.pow(3).sum())


def test_truth_at_fixed_weights():
    model, (grad_form, cov_form) = Bowl(), bowl_truth()
    data = DataLoader(bowl_data(), 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    estimate = measure_noise_scale(
        model,
        data,
        lambda net, batch: (net.diagonal * (net.weight - batch[0]).square()).sum(1).mean() / 2,
        curvature=True,
        relative_error=1e-6,
        max_batches=2000,
        confidence=0.997,
    )
    assert (estimate.probe, estimate.num_measurements) == ("curvature", 400)
    # three standard errors, as the interval says them
    assert estimate.lower < cov_form / grad_form < estimate.upper
    assert estimate.upper < 1.4 * estimate.lower
    # it is another number than the simple noise scale
    simple = float(model.diagonal.square().sum() / (model.diagonal * model.weight.detach()).square().sum())
    assert not estimate.lower < simple < estimate.upper


def test_truth_in_the_callback():
    arguments = {"ema_decay": 1.0, "confidence": 0.997, "curvature_every_n_steps": 5}
    callback = GradientNoiseScaleCallback("consecutive", **arguments)
    trainer = L.Trainer(callbacks=[callback], max_steps=1000, log_every_n_steps=1000, **QUIET)
    trainer.fit(Bowl(), DataLoader(bowl_data(), 16, shuffle=True, generator=torch.Generator().manual_seed(3)))
    estimate = callback.estimate(group="curvature")
    grad_form, cov_form = bowl_truth()
    assert estimate.num_measurements == 200
    # products of two gradients are skewed, for which the upper end is moved out
    assert estimate.lower < cov_form / grad_form < estimate.upper < 1.7 * estimate.lower
    assert float(trainer.callback_metrics["gns/curvature/noise_scale"]) == pytest.approx(estimate.noise_scale)
    assert callback.estimates()["curvature"] == estimate


class UnevenBowl(L.LightningModule):
    """½ a (w - x)² with examples of their own curvature a, so that gradients and Hessian of one batch go together."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        a, x = batch
        return (a * (self.weight - x).square()).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_the_hessian_is_of_a_batch_of_its_own():
    """One measurement on the first five batches: the Hessian of one, the gradients of the other four."""
    generator = torch.Generator().manual_seed(4)
    a = torch.rand(20, generator=generator, dtype=torch.float64)
    x = torch.randn(20, generator=generator, dtype=torch.float64)
    callback = GradientNoiseScaleCallback("consecutive", ema_decay=1.0, curvature_every_n_steps=100)
    L.Trainer(callbacks=[callback], max_steps=5, **QUIET).fit(UnevenBowl(), DataLoader(TensorDataset(a, x), 4))
    estimate = callback.estimate(group="curvature")
    slopes = (a * (1.0 - x)).reshape(5, 4).mean(1)[1:]
    small, big = float(slopes.square().mean() * a[:4].mean()), float(slopes.mean() ** 2 * a[:4].mean())
    assert estimate.num_measurements == 1
    assert estimate.cov_trace == pytest.approx((small - big) / (1 / 4 - 1 / 16), rel=1e-12)
    assert estimate.grad_sq_norm == pytest.approx((16 * big - 4 * small) / 12, rel=1e-12)


class BatchAlone(DigitsMLP):
    """Without ``batch_idx``, which Lightning leaves to the user."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


class NoneAtThird(DigitsMLP):
    """Leaves the third batch out."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("probe", ["consecutive", "per_example"])
@pytest.mark.parametrize(("model", "count"), [(DigitsMLP, 2), (BatchAlone, 2), (NoneAtThird, 1)])
def test_beside_any_probe_and_training_step(model, count, probe):
    """The copy has the probe's hooks, and is not what the probe measures."""
    callback = GradientNoiseScaleCallback(probe, every_n_steps=1, curvature_every_n_steps=5)
    L.Trainer(callbacks=[callback], max_epochs=1, **QUIET).fit(model(), DataLoader(digits(160), 16))
    assert callback.estimate(group="curvature").num_measurements == count
    # the first step has none before it
    assert callback.estimate().num_measurements == 10 - (model is NoneAtThird) - (probe == "consecutive")


class NoisyBowl(Bowl):
    """With everything that a second forward pass could disturb."""

    def __init__(self):
        super().__init__()
        self.noise = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).double()

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0] + 0.1 * self.noise(batch[0])], batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_training_does_not_notice():
    """The same weights, buffers, metrics, logged values and random numbers."""
    outcomes = []
    for every in (None, 1):
        callback = GradientNoiseScaleCallback(every_n_steps=2, curvature_every_n_steps=every)
        torch.manual_seed(0)
        model = NoisyBowl()
        trainer = L.Trainer(callbacks=[callback], max_steps=20, accumulate_grad_batches=2, **QUIET)
        trainer.fit(model, DataLoader(bowl_data(640), 16))
        found = (model.state_dict(), model.seen.compute(), trainer.callback_metrics["loss"], torch.rand(3))
        outcomes.append(found)
    without, with_curvature = outcomes
    assert without[0].keys() == with_curvature[0].keys()
    assert all(torch.equal(with_curvature[0][key], value) for key, value in without[0].items())
    for plain, measured in zip(without[1:], with_curvature[1:], strict=True):
        assert torch.equal(plain, measured)
    assert callback.estimate(group="curvature").num_measurements > 3


def test_a_network_that_learns():
    """Both noise scales of a small classifier, at the same weights, are of the same order, as in the paper."""
    model, data = DigitsMLP(lr=0.4), digits()
    L.Trainer(max_steps=60, **QUIET).fit(model, loader(data))
    curved = measure_noise_scale(model, loader(data), curvature=True, max_batches=1500, relative_error=0.05)
    simple = measure_noise_scale(model, loader(data), max_batches=600, relative_error=0.05)
    assert simple.noise_scale / 4 < curved.noise_scale < 4 * simple.noise_scale
    # and against Hessians written out: tr(HΣ) and GᵀHG over the whole data set
    gradients = per_example_gradients(model, data)
    net = model.net.double()
    x, y = data.tensors
    parameters = list(net.parameters())
    slopes = torch.autograd.grad(nn.functional.cross_entropy(net(x.double()), y), parameters, create_graph=True)
    flat = torch.cat([s.flatten() for s in slopes])

    def product(vector):
        found = torch.autograd.grad(flat, parameters, vector, retain_graph=True)
        return torch.cat([f.flatten() for f in found])

    mean = gradients.mean(0)
    grad_form = float(mean @ product(mean))
    some = gradients[torch.randperm(len(gradients), generator=torch.Generator().manual_seed(0))[:300]]
    forms = torch.stack([g @ product(g) for g in some])
    truth = (float(forms.mean()) - grad_form) / grad_form
    error = float(forms.std()) / math.sqrt(300) / grad_form  # of the 300 examples that were multiplied
    assert curved.lower - 3 * error < truth < curved.upper + 3 * error


def test_refusals():
    class Manual(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    callback = GradientNoiseScaleCallback(curvature_every_n_steps=10)
    trainer = L.Trainer(callbacks=[callback], max_steps=2, **QUIET)
    with pytest.raises(ValueError, match="Manual sets `automatic_optimization = False`; use automatic"):
        trainer.fit(Manual(), loader(digits()))
    for every in (0, 1.5, "x"):
        with pytest.raises(ValueError, match=r"`curvature_every_n_steps` must be a positive whole number"):
            GradientNoiseScaleCallback(curvature_every_n_steps=every)


def test_operations_without_a_second_derivative_are_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    weight = nn.Parameter(torch.ones(3))

    def loss():
        return Once.apply(weight).square().sum()

    with pytest.raises(ValueError, match="an operation that is marked `once_differentiable`"):
        curvature_samples([weight], loss, [(loss, 1), (loss, 1)])
    with pytest.raises(ValueError, match="its gradient depends on no parameter"):
        curvature_samples([weight], weight.sum, [(weight.sum, 1), (weight.sum, 1)])


def test_attention_has_a_second_derivative():
    """The fused kernel has none; the plain one is taken for the measurement."""
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 4, 8)

    def loss():
        return net(x, x, x, need_weights=False)[0].square().mean()

    found = curvature_samples(list(net.parameters()), loss, [(loss, 3), (loss, 3)])
    assert math.isfinite(float(found.grad_sq_norm))


def test_ranks_that_have_a_mean_each():
    """No gradient is averaged over ranks for the curvature: each rank's mean is one of its own samples alone."""
    torch.manual_seed(0)

    def samples():
        rows = torch.randn(4, 6, dtype=torch.float64)
        return GradientSamples(
            sq_norms=rows.square().sum(1),
            sizes=[8.0] * 4,
            weights=[0.25] * 4,
            grad_sq_norm=rows.mean(0).square().sum(),
        )

    steps = [[samples() for _ in range(3)] for _ in range(2)]
    of_ranks = [GradientNoiseScale(ema_decay=1.0) for _ in range(2)]
    alone = GradientNoiseScale(ema_decay=1.0)
    for of_step in zip(*steps, strict=True):
        for rank, (metric, own) in enumerate(zip(of_ranks, of_step, strict=True)):
            metric.add_samples(own, rank=rank, ranks=2)
            alone.add_samples(own)
    of_ranks[0].fold_pending(of_ranks[0].pending + of_ranks[1].pending)
    together = of_ranks[0].estimate()
    assert together.num_measurements == 6
    assert together.cov_trace == pytest.approx(alone.estimate().cov_trace)
    assert together.grad_sq_norm == pytest.approx(alone.estimate().grad_sq_norm)
