"""What is refused, in one sentence that names the module; and what only looks difficult."""

import pytest
import torch
from helpers.per_example_reference import brute_force, check, measure, mixed_loss
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_wn.per_example import (
    Dense,
    PerExampleError,
    PerExampleNorms,
    batch_dependent_layers,
    register_per_example_rule,
)
from lightning_wn.weight_norm import add_mean_only_batch_norm, apply_weight_norm


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.3), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4)])
def test_batch_dependent_layers(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.InstanceNorm1d(4))
    assert batch_dependent_layers(model) == ["1"]
    norms = PerExampleNorms(model, list(model[0].parameters()))
    with pytest.raises(PerExampleError, match="layer '1' makes use of batch statistics"):
        norms.attach()
    layer.eval()
    assert batch_dependent_layers(model) == []


def test_mean_only_batch_norm_mixes_examples_in_training():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    apply_weight_norm(model)
    add_mean_only_batch_norm(model, exclude="1")
    parameters = list(model.parameters())
    assert batch_dependent_layers(model) == ["0.mean_only_batch_norm"]
    with pytest.raises(PerExampleError, match=r"layer '0\.mean_only_batch_norm' makes use of batch statistics"):
        PerExampleNorms(model, parameters).attach()
    model.eval()
    assert batch_dependent_layers(model) == []
    x = torch.randn(3, 4).double()
    check(model, lambda: mixed_loss(model(x)), 3)


def test_batch_norm_without_running_statistics_always_mixes():
    assert batch_dependent_layers(nn.BatchNorm1d(4, track_running_stats=False).eval()) == [""]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules(inside, whole):
    part = nn.Linear(4, 4)
    if inside:
        part.compile()
    else:
        part = torch.compile(part)
    model = part if whole else nn.Sequential(part, nn.Linear(4, 4))
    with pytest.raises(PerExampleError, match=r"torch\.compile"):
        PerExampleNorms(model, list(model.parameters())).attach()


def test_scripted_modules():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(PerExampleError, match="scripted"):
        PerExampleNorms(model, list(model.parameters())).attach()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("part", ["all", "middle"])
def test_checkpointing_is_exact(use_reentrant, part):
    model = net()
    x = torch.randn(3, 5, 4).double().requires_grad_()

    def run():
        if part == "all":
            return mixed_loss(checkpoint(model, x, use_reentrant=use_reentrant))
        return mixed_loss(model[4](checkpoint(model[:4], x, use_reentrant=use_reentrant)))

    parameters = list(model.parameters())
    measured, state = measure(model, parameters, run, 3, steps=2)
    torch.set_rng_state(state)
    torch.testing.assert_close(measured, brute_force(parameters, mixed_loss(model(x)) / 3), rtol=1e-10, atol=0)


def test_a_layer_reused_in_one_checkpoint_is_exact():
    layer = nn.Linear(4, 4).double()
    x = torch.randn(3, 5, 4).double().requires_grad_()
    for use_reentrant in (True, False):

        def run(use_reentrant=use_reentrant):
            return mixed_loss(checkpoint(lambda y: layer(layer(y).tanh()), x, use_reentrant=use_reentrant))

        measured, _ = measure(layer, list(layer.parameters()), run, 3, steps=2)
        expected = brute_force(list(layer.parameters()), mixed_loss(layer(layer(x).tanh())) / 3)
        torch.testing.assert_close(measured, expected, rtol=1e-10, atol=0)


def test_a_layer_reused_in_two_checkpoints():
    layer = nn.Linear(4, 4).double()
    x = torch.randn(3, 5, 4).double().requires_grad_()

    def run(use_reentrant):
        hidden = checkpoint(layer, x, use_reentrant=use_reentrant).tanh()
        return mixed_loss(checkpoint(layer, hidden, use_reentrant=use_reentrant))

    measured, _ = measure(layer, list(layer.parameters()), lambda: run(False), 3)
    expected = brute_force(list(layer.parameters()), mixed_loss(layer(layer(x).tanh())) / 3)
    torch.testing.assert_close(measured, expected, rtol=1e-10, atol=0)
    with pytest.raises(PerExampleError, match="use_reentrant=False"):
        measure(layer, list(layer.parameters()), lambda: run(True), 3)


def test_an_input_changed_in_place_where_autograd_does_not_mind():
    layer = nn.Linear(4, 4)
    x = torch.randn(3, 5, 4)

    def run():
        y = x * 1.0
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(y)  # autograd keeps a rounded copy
        y.add_(1.0)
        return mixed_loss(out.float())

    with pytest.raises(PerExampleError, match="changed in place"):
        measure(layer, list(layer.parameters()), run, 3)


def test_two_backward_passes_through_one_forward():
    layer = nn.Linear(4, 4)
    norms = PerExampleNorms(layer, list(layer.parameters()))
    norms.attach()
    norms.before_forward(3)
    loss = mixed_loss(layer(torch.randn(3, 4))).mean()
    norms.before_backward(loss)
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(PerExampleError, match="reached Linear twice"):
        norms.after_backward()
    # and the next step is a clean one
    x = torch.randn(3, 4)
    measured, _ = measure(layer, list(layer.parameters()), lambda: mixed_loss(layer(x)), 3, norms=norms)
    expected = brute_force(list(layer.parameters()), mixed_loss(layer(x)) / 3)
    torch.testing.assert_close(measured.double(), expected, rtol=1e-5, atol=0)


def test_parameters_of_another_model():
    with pytest.raises(ValueError, match="2 of the parameters to measure are not in the model"):
        PerExampleNorms(nn.Linear(4, 4), list(nn.Linear(4, 4).parameters()))


def test_sequence_first_with_as_many_steps_as_examples():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0).double()
    x = torch.randn(3, 3, 4).double()

    def run():
        return mixed_loss(layer(x).transpose(0, 1))

    parameters = list(layer.parameters())
    with pytest.raises(PerExampleError, match="two dimensions may be the batch"):
        measure(layer, parameters, run, 3)
    check(layer, run, 3, batch_dims={"*": 1})


def test_unbatched_input():
    conv = nn.Conv1d(3, 3, 1)
    with pytest.raises(PerExampleError, match="without a batch dimension"):
        measure(conv, list(conv.parameters()), lambda: mixed_loss(conv(torch.randn(3, 5))[None]), 3)


def test_hooks_of_others_that_change_the_output():
    layer = nn.Linear(4, 4).double()
    layer.register_forward_hook(lambda module, args, output: output * 3)
    x = torch.randn(3, 4).double()
    check(layer, lambda: mixed_loss(layer(x)), 3)


def test_nothing_is_left_behind():
    model = net()
    norms = PerExampleNorms(model, list(model.parameters()))
    norms.attach()
    norms.attach()
    model(torch.randn(3, 4).double()).sum().backward()  # not recording: nothing happens
    norms.before_forward(3)
    model(torch.randn(3, 4).double())
    norms.detach()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for parameter in model.parameters():
        assert not parameter._backward_hooks


def test_a_rule_of_the_user():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x + self.shift

    seen_shapes = []

    @register_per_example_rule(Shift)
    def shift(module, seen):
        seen_shapes.append(seen.grad.shape)
        return {"shift": Dense(seen.grad.flatten(1, -2).sum(1))}

    class Other(Shift):
        pass

    layer, x = Other(), torch.randn(3, 5, 4)
    check(layer, lambda: mixed_loss(layer(x)), 3)
    assert seen_shapes == [(3, 5, 4)] * 2


def test_a_rule_that_forgets_a_parameter():
    class Forgetful(nn.Linear):
        pass

    @register_per_example_rule(Forgetful)
    def forgetful(module, seen):
        return {"bias": seen.grad}

    layer = Forgetful(4, 4)
    with pytest.raises(PerExampleError, match="gave no gradient of weight"):
        measure(layer, list(layer.parameters()), lambda: mixed_loss(layer(torch.randn(3, 4))), 3)
