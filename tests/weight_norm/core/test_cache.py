"""Inside a scope a weight is computed once; it is right whatever happens around and within."""

import copy

import pytest
import torch
from helpers.weight_norm_models import Regression, fit, quiet_trainer, tied
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

from lightning_wn import WeightNormCallback, apply_weight_norm, cached_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.core import cache


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert not cache._slots


def net():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    apply_weight_norm(model)
    return model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_weight_is_computed_once_at_its_first_use(computed, mode):
    model, x = net(), torch.randn(3, 4)
    computed.clear()
    with mode():
        expected = model(x)
        assert len(computed) == 2
        with cached_weight_norm(model):
            assert len(computed) == 2
            for _ in range(3):
                assert torch.equal(model(x), expected)
        assert len(computed) == 4
        model(x)
        assert len(computed) == 6


def test_gradients_are_as_outside():
    model, x = net(), torch.randn(3, 4)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with cached_weight_norm(model):
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()
        # input gradients of a frozen model: a tensor kept in inference mode could not be saved for them
        model.requires_grad_(False)
        y = x.clone().requires_grad_()
        model(y).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert y.grad.abs().sum() > 0


@torch.no_grad()
def test_a_change_by_loading_converting_or_assigning_is_seen():
    model, other = net(), net()
    x = torch.randn(3, 4)
    with cached_weight_norm(model):
        model(x)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other(x))
        model[0].weight = torch.ones(8, 4)
        assert torch.equal(model[0].weight, torch.ones(8, 4))
        model.double()
        assert model(x.double()).dtype == torch.float64


@torch.no_grad()
def test_scopes_nest_and_end_with_an_exception(computed):
    model, x = net(), torch.randn(3, 4)
    with cached_weight_norm(model):
        with cached_weight_norm(model[0]):
            model(x)
        computed.clear()
        model(x)
        assert not computed
    with pytest.raises(RuntimeError, match="cannot be multiplied"), cached_weight_norm(model):
        model(torch.randn(3, 5))
    assert not cache._slots
    before = model(x)
    model[0].parametrizations.weight.original0.data.mul_(2)
    assert not torch.equal(model(x), before)


@torch.no_grad()
def test_a_copy_made_inside_is_not_in_the_scope():
    model, x = net(), torch.randn(3, 4)
    with cached_weight_norm(model):
        before = model(x)
        twin = copy.deepcopy(model)
        twin[0].parametrizations.weight.original0.data.mul_(2)
        assert not torch.equal(twin(x), before)


@torch.no_grad()
def test_folding_inside_a_scope():
    model, x = net(), torch.randn(3, 4)
    with cached_weight_norm(model):
        before = model(x)
        model[0].parametrizations.weight.original0.data.mul_(2)
        fold_weight_norm(model)
        assert not torch.equal(model(x), before)


@torch.no_grad()
def test_other_models_and_tied_weights():
    model, other = tied(), net()
    apply_weight_norm(model, "*")
    with cached_weight_norm(model):
        assert model["embed"].weight is model["embed"].weight
        assert torch.equal(model["head"].weight, model["embed"].weight)
        assert other[0].weight is not other[0].weight


@torch.no_grad()
def test_compiled_models_are_right():
    model, x = net(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with cached_weight_norm(model):
            # the graph writes the formula out, which may round differently from the kernel
            torch.testing.assert_close(compiled(x), model(x))
            torch.testing.assert_close(compiled(x), model(x))
        model[0].parametrizations.weight.original0.data.mul_(2)


class Losses(Regression):
    """Keeps the outputs of every evaluation step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.net(batch[0]).clone())
        super().validation_step(batch, batch_idx)

    test_step = predict_step = validation_step


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
@pytest.mark.parametrize("cached", [True, False])
def test_loops_compute_each_weight_once(computed, loop, cached):
    model = Losses()
    model.log = lambda *args, **kwargs: None
    apply_weight_norm(model)
    computed.clear()
    getattr(quiet_trainer(WeightNormCallback(cache_evaluation=cached)), loop)(model)
    assert len(model.seen) == 4
    assert len(computed) == (2 if cached else 16)  # two forward passes a step


class SwapAtEnd(Callback):
    """Doubles g at the end of validation, and looks at what the model then computes: listed before ours."""

    def on_validation_epoch_end(self, trainer, pl_module):
        g = pl_module.net[0].parametrizations.weight.original0
        before = pl_module.net[0].weight.clone()
        g.data.mul_(2)
        assert torch.equal(pl_module.net[0].weight, 2 * before)
        g.data.mul_(0.5)


def test_averaged_weights_are_what_validation_sees():
    """Against the same run without a cache: EMA swaps by `.data.copy_`, which no version counter shows."""
    runs = []
    for cached in (True, False):
        torch.manual_seed(3)
        model = Losses()
        callbacks = [WeightNormCallback(cache_evaluation=cached), EMAWeightAveraging(decay=0.5)]
        fit(model, *callbacks, max_epochs=3, val_check_interval=2)
        runs.append((model.seen, model.losses, [p.detach() for p in model.parameters()]))
    (seen, losses, parameters), (expected, expected_losses, expected_parameters) = runs
    assert losses == expected_losses
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected_parameters, strict=True))
    assert not torch.equal(seen[0], seen[-4])


def test_the_scope_ends_before_other_callbacks_swap_back():
    model = Regression()
    apply_weight_norm(model)
    fit(model, SwapAtEnd(), WeightNormCallback(), max_epochs=2)
    quiet_trainer(SwapAtEnd(), WeightNormCallback()).validate(model, verbose=False)


def test_an_exception_in_a_loop_ends_the_scope():
    class Fails(Regression):
        def validation_step(self, batch, batch_idx):
            self.net(batch[0])
            raise RuntimeError("interrupted")

    model = Fails()
    apply_weight_norm(model)
    with pytest.raises(RuntimeError, match="interrupted"):
        quiet_trainer(WeightNormCallback()).validate(model)
    assert not cache._slots
