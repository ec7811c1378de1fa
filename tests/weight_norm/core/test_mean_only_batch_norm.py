"""Mean-only batch normalization: the layer, its place behind weight-normalized layers, and folding."""

import copy
import types

import pytest
import torch
from helpers.first_batches import NETS, is_layer
from helpers.weight_norm_models import Regression, fit, normalized, quiet_trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn
from torch.nn.utils import parametrize

from lightning_wn import GradientNoiseScaleCallback, WeightNormCallback
from lightning_wn.probes.micro_batch import MicroBatchProbe
from lightning_wn.weight_norm import MeanOnlyBatchNorm, add_mean_only_batch_norm, apply_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.core.mean_only_batch_norm import mean_only_of

SHAPES = [
    ((6, 4), 1),
    ((6, 4), -1),
    ((5, 3, 4), -1),
    ((5, 4, 3), 1),
    ((2, 4, 3, 3), 1),
    ((2, 4, 3, 3), -3),
    ((4, 9), 0),
]


def by_hand(values, dim, bias=None):
    """Values without the mean of each feature, feature by feature."""
    out, means = values.clone(), []
    for i, feature in enumerate(values.unbind(dim)):
        means.append(feature.mean() - (0 if bias is None else bias[i]))
        out.select(dim, i).copy_(feature - means[-1])
    return out, torch.stack(means)


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_training_subtracts_the_means_and_keeps_a_running_one(shape, dim, with_bias):
    layer = MeanOnlyBatchNorm(4, dim=dim, momentum=0.3).double()
    bias = torch.randn(4).double() if with_bias else None
    running = torch.zeros(4).double()
    for _ in range(3):
        x = torch.randn(shape).double() + 2
        expected, means = by_hand(x, dim, bias)
        running = 0.7 * running + 0.3 * means
        torch.testing.assert_close(layer(x, bias), expected)
        torch.testing.assert_close(layer.running_mean, running)
    layer.eval()
    x = torch.randn(shape).double()
    expected = torch.stack([f - m for f, m in zip(x.unbind(dim), running, strict=True)], dim)
    torch.testing.assert_close(layer(x, bias), expected)
    torch.testing.assert_close(layer.running_mean, running)


def test_gradcheck():
    layer = MeanOnlyBatchNorm(3).double()
    x, bias = torch.randn(4, 3, 2).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, bias))
    # the paper: the gradient by t is centered, too
    layer(x).pow(3).sum().backward()
    torch.testing.assert_close(x.grad.mean((0, 2)), torch.zeros(3).double())


@pytest.mark.parametrize("arguments", [{"momentum": 0.0}, {"momentum": 1.5}, {"num_features": 0}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` got .*but it must be"):
        MeanOnlyBatchNorm(**({"num_features": 3} | arguments))


def test_one_value_or_other_features_are_refused():
    layer = MeanOnlyBatchNorm(3)
    with pytest.raises(ValueError, match=r"got 1 value per feature in training.*larger batch"):
        layer(torch.randn(1, 3))
    with pytest.raises(ValueError, match=r"dimension 1 has 2 features.*built for 3"):
        layer(torch.randn(4, 2))
    assert torch.equal(layer.running_mean, torch.zeros(3))
    layer.eval()(torch.randn(1, 3))


def with_means(model, **arguments):
    apply_weight_norm(model)
    return add_mean_only_batch_norm(model, **arguments)


@pytest.mark.parametrize("name", NETS)
def test_layers_compute_what_the_paper_says_and_fold(name):
    build, shape = NETS[name]
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    plain = copy.deepcopy(model)
    names = with_means(model)
    assert names == [key for key, m in plain.named_modules() if is_layer(m)]
    # in training each layer's output has the mean b
    outputs = {}
    for key in names:
        model.get_submodule(key).register_forward_hook(lambda m, args, out, key=key: outputs.__setitem__(key, out))
    model(x)
    for key in names:
        layer, out = model.get_submodule(key), outputs[key].detach()
        rows = out.reshape(-1, out.shape[-1]).T if isinstance(layer, nn.Linear) else out.transpose(0, 1).flatten(1)
        torch.testing.assert_close(rows.mean(1), layer.bias.detach(), rtol=0, atol=1e-5)
    for _ in range(20):
        model(x + 0.1 * torch.randn(shape))
    model.eval()
    expected = model(x)
    assert set(fold_weight_norm(model)) == set(names)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert str(model) == str(plain)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_without_bias_is_centered_at_0_and_folds_to_one_with_a_bias():
    model = nn.Sequential(nn.Conv1d(2, 3, 2, bias=False))
    with_means(model, momentum=1.0)
    x = torch.randn(8, 2, 5) + 1
    torch.testing.assert_close(model(x).mean((0, 2)), torch.zeros(3), atol=1e-6, rtol=0)
    expected = model.eval()(x)
    fold_weight_norm(model)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    torch.testing.assert_close(model(x), expected)


def test_gradients_of_g_v_and_b_are_those_of_the_formula():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    with_means(layer)
    x = torch.randn(6, 3).double()
    g, v = (getattr(layer.parametrizations.weight, f"original{i}") for i in range(2))

    def formula(g, v, b):
        t = x @ (v / v.norm(dim=1, keepdim=True)).T
        return (g.flatten() * (t - t.mean(0)) + b).pow(3).sum()

    leaves = [p.detach().clone().requires_grad_() for p in (g, v, layer.bias)]
    loss = formula(*leaves)
    loss.backward()
    found = layer(x).pow(3).sum()
    found.backward()
    torch.testing.assert_close(found, loss)
    for p, leaf in zip((g, v, layer.bias), leaves, strict=True):
        torch.testing.assert_close(p.grad, leaf.grad)


def test_copies_are_independent_and_states_move_between_them():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert with_means(model) == ["0", "2"]
    assert add_mean_only_batch_norm(model) == []  # once is enough
    twin = copy.deepcopy(model)
    x = torch.randn(8, 3)
    twin(x)
    assert torch.equal(model[0].mean_only_batch_norm.running_mean, torch.zeros(4))
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model.eval()(x), twin.eval()(x))
    fold_weight_norm(twin)
    assert mean_only_of(model[0]) is not None
    model.train()(x)


def test_frozen_modes_types_and_devices_are_kept():
    model = nn.Sequential(nn.Linear(3, 4)).to(torch.bfloat16).eval()
    model[0].bias.requires_grad_(False)
    with_means(model)
    assert not model[0].mean_only_batch_norm.training
    assert model[0].mean_only_batch_norm.running_mean.dtype == torch.float32
    assert model.train()(torch.randn(5, 3).to(torch.bfloat16)).dtype == torch.bfloat16
    fold_weight_norm(model)
    assert model[0].bias.dtype == torch.bfloat16
    assert not model[0].bias.requires_grad


def test_which_layers_can_have_one():
    class Twice(nn.Module):
        def forward(self, bias):
            return 2 * bias

    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "embedding": nn.Embedding(3, 4),
            "parametrized": nn.Linear(4, 4),
            "plain": nn.Linear(4, 4),
            "linear": nn.Linear(4, 4),
        }
    )
    parametrize.register_parametrization(model["parametrized"], "bias", Twice())
    apply_weight_norm(model, [nn.Linear, nn.Embedding], exclude="plain")
    assert add_mean_only_batch_norm(model) == ["linear"]
    with pytest.raises(ValueError, match="matches no module"):
        add_mean_only_batch_norm(model, "nothing")


def test_autocast_takes_means_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4))
    with_means(model, momentum=1.0)
    x = torch.randn(4096, 16) + 2
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    expected = (x @ model[0].weight.detach().T).mean(0)
    # inputs and weights are rounded to bfloat16, and the mean over 4096 values is not
    torch.testing.assert_close(model[0].mean_only_batch_norm.running_mean, expected, rtol=5e-3, atol=5e-3)


def test_a_compiled_model_computes_the_same():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with_means(model)
    twin = copy.deepcopy(model)
    x = torch.randn(8, 3)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), twin(x))
    torch.testing.assert_close(model[0].mean_only_batch_norm.running_mean, twin[0].mean_only_batch_norm.running_mean)


class WithMeans(Regression):
    def __init__(self, bias=True):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 2, bias=bias)))


def test_the_callback_puts_it_behind_its_layers_and_it_trains():
    model = WithMeans()
    callbacks = [
        WeightNormCallback("net.0", mean_only_batch_norm=True, mean_only_momentum=0.5),
        WeightNormCallback("net.2"),
    ]
    trainer = fit(model, *callbacks, max_epochs=20)
    assert normalized(model) == ["net.0", "net.2"]
    assert model.net[0].mean_only_batch_norm.momentum == 0.5
    assert mean_only_of(model.net[2]) is None
    assert sum(model.losses[-4:]) < 0.9 * sum(model.losses[:4])
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    # a second fit goes on
    before = model.net[0].mean_only_batch_norm
    fit(model, *callbacks)
    assert model.net[0].mean_only_batch_norm is before


def test_a_file_of_it_is_read_into_a_plain_model(tmp_path):
    model = WithMeans()
    trainer = fit(model, WeightNormCallback(mean_only_batch_norm=True), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "means.ckpt")
    expected = torch.cat(trainer.predict(model))
    plain = WithMeans()
    found = quiet_trainer(WeightNormCallback()).predict(plain, ckpt_path=tmp_path / "means.ckpt")
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)
    assert normalized(plain) == []
    resumed = WithMeans()
    quiet_trainer(WeightNormCallback(mean_only_batch_norm=True), max_epochs=5).fit(
        resumed, ckpt_path=tmp_path / "means.ckpt"
    )


class KeepsBatch(Callback):
    """Keeps the last batch of training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch


@pytest.mark.parametrize("bias", [True, False])
def test_data_dependent_initialization_sets_the_running_means(bias):
    model, watch = WithMeans(bias), KeepsBatch()
    model.lr = 0.0
    fit(
        model,
        WeightNormCallback(init="data", mean_only_batch_norm=True, checkpoint="folded" if bias else "parametrized"),
        watch,
        limit_train_batches=1,
        limit_val_batches=0,
    )
    outputs = []
    for i in (0, 2):
        model.net[i].register_forward_hook(lambda m, args, out: outputs.append(out))
    for mode in (model.train(), model.eval()):
        outputs.clear()
        mode.net(watch.batch[0])
        assert len(outputs) == 2
        for out in outputs:
            torch.testing.assert_close(out.mean(0), torch.zeros(out.shape[1]), atol=1e-5, rtol=0)
            torch.testing.assert_close(out.std(0, correction=0), torch.ones(out.shape[1]), atol=1e-4, rtol=0)


def test_a_layer_that_came_later_is_not_left_out_in_silence():
    class Late(Regression):
        def setup(self, stage):
            self.extra = nn.Linear(2, 2)
            apply_weight_norm(self)

    with pytest.raises(ValueError, match=r"'extra' \(Linear\) would train without mean-only") as error:
        fit(Late(), WeightNormCallback(mean_only_batch_norm=True))
    assert "add_mean_only_batch_norm(self)" in str(error.value)


def test_workers_that_send_weights_home_fold_the_means_or_are_refused():
    model, callback = WithMeans(), WeightNormCallback(mean_only_batch_norm=True)
    trainer = quiet_trainer(callback, strategy="ddp_fork")
    assert isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    trainer.strategy.connect(model)
    names = list(model.state_dict())
    callback.setup(trainer, model, "fit")
    model.net(torch.randn(8, 4))
    callback.teardown(trainer, model, "fit")
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match=r"'net\.0' \(Linear\), 'net\.2' \(Linear\) would come home .*`bias=True`"):
        callback.setup(trainer, WithMeans(bias=False), "fit")


def test_it_lives_with_the_noise_scale():
    model = WithMeans()
    noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
    fit(model, WeightNormCallback(mean_only_batch_norm=True), noise_scale, max_epochs=3)
    # no example has a gradient of its own
    assert noise_scale.estimate().probe == "batch_pair"


def test_ranks_whose_means_are_synchronized_are_no_independent_samples():
    trainer = types.SimpleNamespace(world_size=2, accumulate_grad_batches=1, callbacks=[], strategy=None)
    apart, together = WithMeans(), WithMeans()
    with_means(apart)
    with_means(together, synchronize=True)
    probe = MicroBatchProbe()
    probe.require_readable(trainer, apart, wrapped=False)
    with pytest.raises(ValueError, match=r"synchronized means in 'net\.0\.mean_only_batch_norm' mix their examples"):
        probe.require_readable(trainer, together, wrapped=False)


def test_a_wrong_momentum_fails_when_the_callback_is_built():
    with pytest.raises(ValueError, match="`mean_only_momentum` got 2"):
        WeightNormCallback(mean_only_momentum=2)
