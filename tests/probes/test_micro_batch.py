"""The micro-batch probe against gradients taken by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.norms import foreach_norms
from lightning_wn.noise_scale.samples import Measurement, Rejection, measurement_from_row
from lightning_wn.probes.micro_batch import MicroBatchProbe


def run_window(model, batches, loss_scale=None, weight=None, loss=None):
    """One accumulation window under the probe; returns the samples and each batch's own gradient."""
    probe = MicroBatchProbe()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = loss or (lambda batch: model(batch).square().mean())
    weight = 1 / len(batches) if weight is None else weight
    gradients = []
    for batch in batches:
        grads = torch.autograd.grad(loss(batch), parameters, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in grads if g is not None]).double())
    model.zero_grad()
    probe.begin(0, 1, model, MeasuredParameters(parameters))
    scale = 1.0 if loss_scale is None else float(loss_scale)
    for batch in batches:
        probe.before_backward()
        (loss(batch) * weight * scale).backward()
        probe.after_backward(len(batch), weight, loss_scale)
    samples = probe.finish(loss_scale, full=True)
    probe.detach()
    return samples, torch.stack(gradients)


def small_net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)


def batches(sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 5, generator=generator, dtype=dtype) for n in sizes]


@pytest.mark.parametrize("weight", [None, 0.25])
def test_norms_are_those_of_the_gradients(weight):
    """With weight 1/4 for 3 micro-batches the window is short: Lightning divided by 4 all the same."""
    samples, gradients = run_window(small_net(), batches((3, 4, 2)), weight=weight)
    torch.testing.assert_close(samples.sq_norms, gradients.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(samples.grad_sq_norm, gradients.mean(0).square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(samples.checksums.mean(0), samples.grad_checksums, rtol=1e-10, atol=1e-14)
    assert (samples.checksums.abs() > 0).sum() == 9  # three of four slots: the largest parameter is the first
    assert samples.sizes == [3.0, 4.0, 2.0]
    assert isinstance(measurement_from_row(samples.to_row().tolist(), 0.01), Measurement)


def test_loss_scale_is_undone():
    scale = torch.tensor(1024.0)
    scaled, gradients = run_window(small_net(), batches((3, 4)), loss_scale=scale)
    torch.testing.assert_close(scaled.sq_norms, gradients.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.grad_sq_norm, gradients.mean(0).square().sum(), rtol=1e-12, atol=0)


def test_tied_parameters_count_once():
    net = small_net()
    tied = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 5, bias=False)).double()
    tied[2].weight = tied[0].weight
    for model in (net, tied):
        samples, gradients = run_window(model, batches((3, 4)))
        torch.testing.assert_close(samples.sq_norms, gradients.square().sum(1), rtol=1e-12, atol=0)


def test_frozen_and_unused_parameters():
    net = small_net()
    net[0].weight.requires_grad_(False)
    net.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    net.register_parameter("scalar", nn.Parameter(torch.ones((), dtype=torch.float64)))
    samples, gradients = run_window(net, batches((3, 4)), loss=lambda b: (net(b) * net.scalar).square().mean())
    torch.testing.assert_close(samples.sq_norms, gradients.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(samples.grad_sq_norm, gradients.mean(0).square().sum(), rtol=1e-12, atol=0)


def test_non_contiguous_gradients():
    weight = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    model = nn.Module()
    model.weight = weight
    samples, gradients = run_window(model, batches((3, 4)), loss=lambda b: (b @ weight.T).pow(3).mean())
    torch.testing.assert_close(samples.sq_norms, gradients.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(samples.checksums.mean(0), samples.grad_checksums, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_norms_are_kept_in_float32(dtype):
    parameter = nn.Parameter(torch.zeros(1000, dtype=dtype))
    grad = (torch.randn(1000) * 300).to(dtype)
    probe = MicroBatchProbe()
    probe.begin(0, 1, nn.Module(), MeasuredParameters([parameter]))
    for _ in range(2):
        probe.before_backward()
        parameter.backward(grad)
        probe.after_backward(4, 0.5, None)
    samples = probe.finish(None, full=True)
    probe.detach()
    expected = grad.double().square().sum() * 4  # over the weight, squared
    # float32 sums of 1,000 exactly represented squares; bfloat16 would be off by 1e-3
    torch.testing.assert_close(samples.sq_norms, expected.expand(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(foreach_norms([grad])[0].double(), grad.double().norm(), rtol=1e-6, atol=0)


def test_foreach_norms_of_mixed_dtypes():
    grads = [torch.randn(4), torch.randn(3, dtype=torch.float64), torch.randn(5, dtype=torch.bfloat16)]
    total = sum(float(norm) ** 2 for norm in foreach_norms(grads))
    assert total == pytest.approx(sum(float(g.double().square().sum()) for g in grads), rel=1e-5)


def test_reentrant_checkpoint_of_a_reused_layer_is_irregular():
    """There the hook fires with each part of the gradient: |a|² + |b|² is not |a + b|²."""
    layer = nn.Linear(5, 5).double()

    def loss(batch, reentrant):
        batch = batch.requires_grad_()
        once = checkpoint(layer, batch, use_reentrant=reentrant)
        return checkpoint(layer, once.tanh(), use_reentrant=reentrant).square().mean()

    def outcome(reentrant):
        probe = MicroBatchProbe()
        probe.begin(0, 1, layer, MeasuredParameters(list(layer.parameters())))
        for batch in batches((3, 4)):
            probe.before_backward()
            (loss(batch, reentrant) / 2).backward()
            probe.after_backward(len(batch), 0.5, None)
        samples = probe.finish(None, full=True)
        probe.detach()
        layer.zero_grad()
        return measurement_from_row(samples.to_row().tolist(), 0.01)

    assert outcome(True) is Rejection.IRREGULAR
    assert isinstance(outcome(False), Measurement)


@pytest.mark.parametrize("uniform", [True, False])
def test_gradients_edited_before_the_step(uniform):
    """One factor on all of them leaves the numbers as they were; anything else is a mismatch."""
    net = small_net()
    probe = MicroBatchProbe()
    probe.begin(0, 1, net, MeasuredParameters(list(net.parameters())))
    for batch in batches((3, 4)):
        probe.before_backward()
        (net(batch).square().mean() / 2).backward()
        probe.after_backward(len(batch), 0.5, None)
    whole = sum(float(p.grad.square().sum()) for p in net.parameters())
    for place, parameter in enumerate(net.parameters()):
        parameter.grad.mul_(0.9 if uniform or not place else 1.0)
    samples = probe.finish(None, full=True)
    probe.detach()
    result = measurement_from_row(samples.to_row().tolist(), 0.01)
    if uniform:
        mean, spread = result.pairs[0]
        # of two samples of 3 and 4 examples that weigh alike
        assert mean + spread * (1 / 3 + 1 / 4) / 4 == pytest.approx(whole, rel=1e-5)
    else:
        assert result is Rejection.MISMATCH


def test_gradients_taken_outside_the_backward_pass_are_ignored():
    net = small_net()
    probe = MicroBatchProbe()
    parameters = list(net.parameters())
    probe.begin(0, 1, net, MeasuredParameters(parameters))
    for batch in batches((3, 4)):
        torch.autograd.grad(net(batch).sum(), parameters)  # fires the hooks
        probe.before_backward()
        (net(batch).square().mean() / 2).backward()
        probe.after_backward(len(batch), 0.5, None)
    samples = probe.finish(None, full=True)
    probe.detach()
    assert isinstance(measurement_from_row(samples.to_row().tolist(), 0.01), Measurement)


def test_hooks_come_and_go():
    net = small_net()
    probe = MicroBatchProbe()
    parameters = list(net.parameters())
    measured = MeasuredParameters(parameters)
    probe.begin(0, 1, net, measured)
    probe.begin(0, 1, net, measured)
    assert [len(p._backward_hooks) for p in parameters] == [1] * 4
    probe.begin(1, 1, net, MeasuredParameters(parameters[:2]))
    assert [len(p._backward_hooks) for p in parameters] == [1, 1, 0, 0]
    probe.detach()
    assert [len(p._backward_hooks) for p in parameters] == [0] * 4


def test_global_random_state_is_untouched():
    net = small_net()
    state = torch.get_rng_state()
    run_window(net, batches((3, 4)))
    assert torch.equal(state, torch.get_rng_state())


def test_compiled_module_is_seen():
    net = small_net(torch.float32)
    compiled = torch.compile(net, backend="aot_eager")
    data = batches((3, 4), torch.float32)
    samples, gradients = run_window(net, data, loss=lambda b: compiled(b).square().mean())
    # float32 gradients of a compiled and of an eager graph
    torch.testing.assert_close(samples.sq_norms, gradients.square().sum(1), rtol=1e-5, atol=0)


def test_sparse_gradients_are_refused_in_a_sentence():
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(6, 5))

    def loss(batch):
        return nn.functional.embedding(torch.tensor([1, 2]), model.weight, sparse=True).sum()

    probe = MicroBatchProbe()
    probe.begin(0, 1, model, MeasuredParameters([model.weight]))
    probe.before_backward()
    with pytest.raises(ValueError, match=r"sparse_coo gradient of a parameter of shape \(6, 5\); look it up with"):
        loss(None).backward()
    probe.detach()
