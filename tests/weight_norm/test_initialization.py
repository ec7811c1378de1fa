"""Data-dependent initialization, without a Trainer: what it sets, and what it leaves alone."""

import copy

import pytest
import torch
from helpers.first_batches import NETS, moments_of, reference
from torch import nn
from torch.nn.utils import parametrize

from lightning_wn.weight_norm import (
    DataDependentInitialization,
    apply_weight_norm,
    cached_weight_norm,
    fold_weight_norm,
)
from lightning_wn.weight_norm.core.selection import NamedLayer


def named(model):
    return [NamedLayer((name,), module) for name, module in model.named_modules()]


def initialize(model, *batch):
    with DataDependentInitialization(named(model)) as initialization:
        model(*batch)
    return initialization.report()


def values(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_equal_values(model, before):
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("name", NETS)
def test_every_unit_has_mean_0_and_variance_1(name):
    build, shape = NETS[name]
    torch.manual_seed(0)
    model, x = build(), 3 * torch.randn(shape) + 1
    apply_weight_norm(model)
    before = values(model)
    report = initialize(model, x)
    assert not report.unreached
    for layer, (mean, deviation) in moments_of(model, x).items():
        assert mean.abs().max() < 1e-4, layer
        assert (deviation - 1).abs().max() < 1e-3, layer
    for key, value in values(model).items():
        if key.endswith("original1"):
            assert torch.equal(value, before[key])  # directions are kept


@pytest.mark.parametrize("name", [name for name in NETS if name != "residual"])
def test_it_equals_a_layer_by_layer_reference(name):
    build, shape = NETS[name]
    torch.manual_seed(0)
    model, x = build(), 3 * torch.randn(shape) + 1
    expected = reference(model, x)
    apply_weight_norm(model)
    initialize(model, x)
    assert expected
    for key, (g, b) in expected.items():
        layer = model.get_submodule(key)
        # the reference is in float64
        torch.testing.assert_close(
            layer.parametrizations.weight.original0.detach().flatten().double(), g, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(layer.bias.detach().double(), b, rtol=1e-5, atol=1e-5)


def test_g_and_b_of_one_linear_by_hand():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    apply_weight_norm(layer)
    initialize(layer, torch.tensor([[0.0, 0.0], [10.0, 20.0]]))
    # x · v/|v| is 0 and 22 in the first unit, 0 and -20 in the second: deviations 11 and 10, means 11 and -10
    g = layer.parametrizations.weight.original0
    torch.testing.assert_close(g.flatten().tolist(), [1 / 11, 1 / 10])
    torch.testing.assert_close(layer.bias.tolist(), [-1.0, 1.0])


def test_the_variance_is_the_biased_one():
    layer = nn.Linear(3, 4)
    apply_weight_norm(layer)
    x = torch.randn(5, 3)
    initialize(layer, x)
    torch.testing.assert_close(layer(x).var(0, correction=0), torch.ones(4))


def test_a_zero_unit_becomes_alive_and_a_negative_g_positive():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight[1:2].detach())
    apply_weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0[2] *= -1
    x = torch.randn(64, 4)
    initialize(layer, x)
    assert (layer.parametrizations.weight.original0 > 0).all()
    torch.testing.assert_close(layer(x).std(0, correction=0), torch.ones(3))


def test_without_a_bias_only_the_variance_is_set():
    layer = nn.Linear(4, 3, bias=False)
    apply_weight_norm(layer)
    x = torch.randn(64, 4) + 2
    initialize(layer, x)
    torch.testing.assert_close(layer(x).std(0, correction=0), torch.ones(3))
    assert layer(x).mean(0).abs().min() > 0.01


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_unit_that_is_constant_on_the_batch_keeps_g_and_is_centered(scale):
    torch.manual_seed(1)
    layer = nn.Linear(40, 3)
    with torch.no_grad():
        layer.weight[1, :5] = 0  # sees only the inputs that do not vary
    apply_weight_norm(layer)
    g = layer.parametrizations.weight.original0.detach().clone()
    x = scale * torch.randn(40).expand(257, 40).clone()
    x[:, :5] = torch.randn(257, 5)
    initialize(layer, x)
    assert torch.equal(layer.parametrizations.weight.original0[1], g[1])
    assert not torch.equal(layer.parametrizations.weight.original0[0], g[0])
    out = layer(x)
    # float32's rounding of a sum of 40 terms of this scale
    assert out[:, 1].abs().max() < 1e-5 * scale
    torch.testing.assert_close(out[:, 0].std(correction=0).item(), 1.0, atol=2e-3, rtol=0)


def test_rounding_is_no_variance():
    torch.manual_seed(0)
    layer = nn.Linear(40, 2)
    with torch.no_grad():
        layer.weight[0, [0, -1]] = torch.tensor([0.5, -0.5])
    apply_weight_norm(layer)
    g = layer.parametrizations.weight.original0.detach().clone()
    x = torch.randn(40).expand(300, 40).clone()
    # two large inputs that cancel out in the first unit, up to the rounding of the terms between them
    x[:, 0] = 1000 * torch.randn(300)
    x[:, -1] = x[:, 0]
    assert layer(x)[:, 0].std() > 0
    initialize(layer, x)
    assert torch.equal(layer.parametrizations.weight.original0[0], g[0])
    torch.testing.assert_close(layer(x)[:, 1].std(correction=0).item(), 1.0, atol=1e-3, rtol=0)


@pytest.mark.parametrize("frozen", ["original0", "bias"])
def test_what_is_frozen_is_not_touched(frozen):
    layer = nn.Linear(4, 3)
    apply_weight_norm(layer)
    tensor = layer.bias if frozen == "bias" else layer.parametrizations.weight.original0
    tensor.requires_grad_(False)
    before = values(layer)
    x = torch.randn(64, 4) + 1
    report = initialize(layer, x)
    if frozen == "original0":
        assert_equal_values(layer, before)
        assert report.frozen == ("",)
    else:
        assert torch.equal(layer.bias, before["bias"])
        torch.testing.assert_close(layer(x).std(0, correction=0), torch.ones(3))


def test_a_layer_used_twice_is_set_by_its_first_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    model, x = Twice(), torch.randn(32, 4) + 1
    alone = copy.deepcopy(model.layer)
    for module in (model, alone):
        apply_weight_norm(module)
    initialize(model, x)
    initialize(alone, x)
    assert_equal_values(model.layer, values(alone))


def test_tied_weights_are_set_by_the_first_layer_and_each_bias_by_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    apply_weight_norm(model)
    x = torch.randn(64, 4) + 1
    initialize(model, x)
    first, second = moments_of(model, x).values()
    torch.testing.assert_close(first[1], torch.ones(4).double(), rtol=1e-5, atol=0)
    assert (second[1] - 1).abs().max() > 0.01
    for mean, _ in (first, second):
        assert mean.abs().max() < 1e-5
    model(x).sum().backward()  # g was not changed after its first use


def test_a_shared_bias_is_set_by_the_first_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    apply_weight_norm(model)
    x = torch.randn(64, 4) + 1
    initialize(model, x)
    first, second = moments_of(model, x).values()
    assert first[0].abs().max() < 1e-5
    assert second[0].abs().max() > 0.01
    for _, deviation in (first, second):
        torch.testing.assert_close(deviation, torch.ones(4).double(), rtol=1e-5, atol=0)


def test_only_called_layers_are_set_and_the_rest_is_named():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "spare": nn.Linear(3, 3)})
    apply_weight_norm(model)
    before = values(model["spare"])
    with DataDependentInitialization(named(model)) as initialization:
        model["used"](torch.randn(8, 3))
    assert initialization.report().initialized == ("used",)
    assert initialization.report().unreached == ("spare",)
    assert_equal_values(model["spare"], before)


def test_recurrent_attention_and_embedding_weights_are_left_alone():
    model = nn.ModuleList([nn.Embedding(7, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)])
    apply_weight_norm(model, [nn.Embedding, nn.Linear])
    kept = values(model)
    with DataDependentInitialization(named(model)) as initialization:
        model[1](model[0](torch.arange(21).view(3, 7) % 7))
    assert initialization.report().initialized == ("1.linear1", "1.linear2")
    assert not initialization.report().unreached
    for name, value in values(model).items():
        assert ("linear" in name and not name.endswith("original1")) != torch.equal(value, kept[name]), name


def test_unbatched_inputs_of_convolutions():
    layer = nn.Conv1d(2, 3, 3)
    apply_weight_norm(layer)
    x = torch.randn(2, 50)
    initialize(layer, x)
    torch.testing.assert_close(layer(x).mean(1), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_get_moments_in_float32(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 16).to(dtype)
    wide = copy.deepcopy(layer).float()
    for module in (layer, wide):
        apply_weight_norm(module)
    x = torch.randn(500, 64).to(dtype) + 4
    initialize(layer, x)
    initialize(wide, x.float())
    expected = wide.parametrizations.weight.original0.to(dtype)
    torch.testing.assert_close(
        layer.parametrizations.weight.original0, expected, rtol=2 * torch.finfo(dtype).eps, atol=0
    )


def test_autocast_does_not_reach_the_moments():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    apply_weight_norm(model)
    plain = copy.deepcopy(model)
    x = torch.randn(500, 64) + 4
    with torch.autocast("cpu", torch.bfloat16):
        initialize(model, x)
    initialize(plain, x)
    assert_equal_values(model[0], values(plain[0]))
    # the second layer's input is of bfloat16: 3 significant digits
    torch.testing.assert_close(values(model[2]), values(plain[2]), rtol=0.03, atol=0.03)


def test_a_cached_weight_is_not_a_stale_one():
    layer = nn.Linear(4, 3)
    apply_weight_norm(layer)
    x = torch.randn(64, 4)
    with parametrize.cached():
        assert layer.weight.shape == (3, 4)
        initialize(layer, x)
        torch.testing.assert_close(layer(x).std(0, correction=0), torch.ones(3))


@torch.no_grad()
def test_a_scope_that_keeps_weights_keeps_the_initialized_ones():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    apply_weight_norm(model)
    x = torch.randn(64, 4)
    with cached_weight_norm(model):
        model(x)
        initialize(model, x)
        inside = model(x)
    assert torch.equal(inside, model(x))
    torch.testing.assert_close(inside.std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(inside.mean(0), torch.zeros(3), rtol=0, atol=1e-5)


def test_compiled_models_are_initialized_too():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    apply_weight_norm(model)
    x = torch.randn(64, 4)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with DataDependentInitialization(named(model)) as initialization:
        compiled(x)
    assert initialization.report().initialized == ("0", "2")
    assert not graphs
    torch.testing.assert_close(compiled(x).std(0, correction=0), torch.ones(3))
    assert len(graphs) == 1  # without a hook in it


def test_initializations_that_overlap_leave_compilation_on():
    torch._dynamo.reset()
    model = nn.Linear(4, 3)
    apply_weight_norm(model)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    first, second = (DataDependentInitialization(named(model)) for _ in range(2))
    first.attach()
    second.attach()
    first.detach()
    compiled(torch.randn(8, 4))
    assert not graphs
    second.detach()
    compiled(torch.randn(8, 4))
    assert len(graphs) == 1


class Noisy(nn.Linear):
    """Counts its calls and draws random numbers, but stays linear in its weight."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, scale=1.0):
        self.calls += 1
        return super().forward(scale * x + 0.0 * torch.randn_like(x))


class Activated(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


class Several(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


def test_a_forward_method_of_ones_own_runs_without_a_trace():
    layer, calls = Noisy(4, 3), []
    apply_weight_norm(layer)
    layer.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(64, 4)
    torch.manual_seed(3)
    with DataDependentInitialization(named(layer)):
        out = layer(x, scale=5.0)
    after = torch.rand(3)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(3))
    assert layer.calls == len(calls) == 1
    torch.manual_seed(3)
    layer(x)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("kind", [Activated, Several])
def test_what_is_no_pre_activation_is_refused(kind):
    model = nn.Sequential(nn.Linear(4, 4), kind(4, 3))
    apply_weight_norm(model)
    before = values(model)
    with pytest.raises(ValueError, match=r"cannot set '1' \((Activated|Several)\), because its own `forward`.*exclude"):
        initialize(model, torch.randn(64, 4))
    assert_equal_values(model, before)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.randn(1, 4), "each unit of '0' .Linear. has 1 value there.*larger batch"),
        (torch.randn(0, 4), "each unit of '0' .Linear. has 0 values there"),
        (torch.full((8, 4), float("nan")), "NaN or infinite values in the pre-activations of '0'"),
    ],
)
def test_a_batch_that_cannot_serve_is_refused_and_nothing_changes(x, words):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    apply_weight_norm(model)
    before = values(model)
    with pytest.raises(ValueError, match=words):
        initialize(model, x)
    assert_equal_values(model, before)
    assert not model[0]._forward_pre_hooks
    assert not model[1]._forward_pre_hooks


def test_a_failure_in_a_late_layer_gives_the_early_ones_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Linear(32, 3))
    apply_weight_norm(model)
    before = values(model)
    with pytest.raises(ValueError, match="each unit of '2'"):
        initialize(model, torch.randn(8, 4))
    assert_equal_values(model, before)


def test_gradients_flow_through_the_first_batch():
    """The gradients of the first batch are those of the initialized model."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    apply_weight_norm(model)
    x = torch.randn(64, 4)
    with DataDependentInitialization(named(model)):
        loss = model(x).square().mean()
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    for grad, p in zip(grads, model.parameters(), strict=True):
        assert torch.equal(grad, p.grad)


def test_folding_keeps_what_was_initialized():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 4, 3, groups=1))
    apply_weight_norm(model)
    x = torch.randn(4, 2, 6, 6)
    initialize(model, x)
    out = model(x)
    fold_weight_norm(model)
    assert torch.equal(model(x), out)
