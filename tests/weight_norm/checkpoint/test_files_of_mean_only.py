"""Files of layers with running means: what is refused, what is missing, and who loads what."""

import copy

import pytest
import torch
from helpers.weight_norm_models import Regression, fit, quiet_trainer
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import add_mean_only_batch_norm, apply_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.checkpoint.state_dict import save_as_weights


class Model(Regression):
    """The same at every start."""

    def __init__(self, bias=True):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 2, bias=bias)))


X = torch.randn(9, 4, generator=torch.Generator().manual_seed(5))


def trained():
    model = Model()
    fit(model, WeightNormCallback(mean_only_batch_norm=True), max_epochs=3)
    return model.eval()


def with_means(model):
    apply_weight_norm(model)
    add_mean_only_batch_norm(model)
    save_as_weights(model.modules(), True)
    return model


def test_the_saved_bias_is_that_of_the_folded_layer():
    model = trained()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert list(state) == list(Model().state_dict())
    layer = model.net[0]
    torch.testing.assert_close(state["net.0.bias"], layer.bias - layer.mean_only_batch_norm.running_mean)
    assert layer.mean_only_batch_norm.running_mean.abs().max() > 0.01
    fold_weight_norm(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_loading_its_own_state_changes_nothing():
    model = trained()
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    for old, new in zip(before, (*model.parameters(), *model.buffers()), strict=True):
        assert torch.equal(old, new)


def test_a_plain_state_is_taken_with_means_of_0():
    model, plain = trained(), Model()
    nn.init.normal_(plain.net[0].bias)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.net[0].bias, plain.net[0].bias)
    assert torch.equal(model.net[0].mean_only_batch_norm.running_mean, torch.zeros(8))
    assert torch.equal(model.net(X), plain.net(X))


def test_a_missing_bias_is_named_as_in_the_plain_model():
    model = with_means(Model())
    state = Model().state_dict()
    del state["net.0.bias"], state["net.2.weight"]
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "net.0.bias", "net.2.weight".' in str(error.value)
    # what only this package has is asked for where the file is of this package
    save_as_weights(model.modules(), False)
    state = model.state_dict()
    del state["net.0.mean_only_batch_norm.running_mean"], state["net.0.bias"]
    with pytest.raises(RuntimeError, match=r'"net\.0\.bias"'):
        model.load_state_dict(state)


def test_a_file_of_g_v_and_means_is_loaded_into_folded_form_and_back():
    model = trained()
    save_as_weights(model.modules(), False)
    state = copy.deepcopy(model.state_dict())
    assert "net.0.mean_only_batch_norm.running_mean" in state
    other = with_means(Model()).eval()
    other.load_state_dict(state)
    assert torch.equal(other.net(X), model.net(X))
    plain = Model()
    plain.load_state_dict(other.state_dict())
    # b - mean is rounded once in float32
    torch.testing.assert_close(plain.net(X), model.net(X), rtol=1e-6, atol=1e-6)


def test_weights_edited_in_the_file_win(tmp_path):
    model = Model()
    fit(model, WeightNormCallback(mean_only_batch_norm=True)).save_checkpoint(tmp_path / "last.ckpt")
    file = torch.load(tmp_path / "last.ckpt", weights_only=True)
    file["state_dict"]["net.0.bias"] += 1
    torch.save(file, tmp_path / "edited.ckpt")
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            layer = pl_module.net[0]
            seen["bias"] = layer.bias - layer.mean_only_batch_norm.running_mean

    trainer = quiet_trainer(WeightNormCallback(mean_only_batch_norm=True), Look(), max_epochs=2)
    with pytest.warns(UserWarning, match=r"b and running mean of net\.0\.bias that are not those of its weights"):
        trainer.fit(Model(), ckpt_path=tmp_path / "edited.ckpt")
    assert torch.equal(seen["bias"], file["state_dict"]["net.0.bias"])


def test_the_learning_rate_finder_brings_bias_and_mean_back(tmp_path):
    found = []

    class Look(Callback):
        def on_fit_start(self, trainer, pl_module):
            found.append([t.detach().clone() for t in (*pl_module.parameters(), *pl_module.buffers())])

    model = trained()
    finder = LearningRateFinder(num_training_steps=10)
    callback = WeightNormCallback(mean_only_batch_norm=True)
    fit(model, callback, Look(), finder, Look(), default_root_dir=tmp_path)
    for before, after in zip(*found, strict=True):
        assert torch.equal(before, after)


def test_averages_hold_running_means(tmp_path):
    model, plain = Model(), Model()
    callbacks = [WeightNormCallback(init="data", mean_only_batch_norm=True), EMAWeightAveraging(decay=0.5)]
    trainer = quiet_trainer(*callbacks, max_epochs=3)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    plain.load_state_dict(torch.load(tmp_path / "averaged.ckpt", weights_only=True)["state_dict"])
    # Lightning leaves the average in the model when `fit` ends
    torch.testing.assert_close(plain.net(X), model.eval().net(X), rtol=1e-6, atol=1e-6)


def test_averages_are_of_what_the_first_batch_set():
    model = Model()
    model.lr = 0.0
    callbacks = [WeightNormCallback(init="data", mean_only_batch_norm=True), WeightAveraging()]
    fit(model, *callbacks, limit_train_batches=1)
    outputs = []
    for i in (0, 2):
        model.net[i].register_forward_hook(lambda m, args, out: outputs.append(out))
    model.eval().net(next(iter(model.data()))[0])
    for out in outputs:
        torch.testing.assert_close(out.mean(0), torch.zeros(out.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(out.std(0, correction=0), torch.ones(out.shape[1]), atol=1e-3, rtol=0)


class Configured(Model):
    def configure_model(self):
        apply_weight_norm(self)


@pytest.mark.parametrize(
    ("bias", "behind", "words"),
    [
        (False, [], r"'net\.0' \(Linear\), 'net\.2' \(Linear\) would be saved without.*`checkpoint=\"parametrized\"`"),
        (True, [StochasticWeightAveraging(swa_lrs=0.1)], "not work with StochasticWeightAveraging.*`WeightAveraging`"),
    ],
)
def test_what_would_lose_the_means_is_refused(bias, behind, words):
    with pytest.raises(ValueError, match=words):
        fit(Model(bias), WeightNormCallback(mean_only_batch_norm=True), *behind)


def test_an_average_that_was_made_before_is_refused():
    with pytest.raises(ValueError, match=r"WeightAveraging is listed before.*list WeightNormCallback first"):
        fit(Configured(), WeightAveraging(), WeightNormCallback(mean_only_batch_norm=True))


def test_a_shared_bias_is_refused_and_nothing_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    apply_weight_norm(model)
    with pytest.raises(ValueError, match=r"'0' \(Linear\) and '1' \(Linear\) share one bias"):
        add_mean_only_batch_norm(model)
    assert not hasattr(model[0], "mean_only_batch_norm")


def test_layers_without_values_get_means_of_0():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    apply_weight_norm(model)
    add_mean_only_batch_norm(model)
    assert model[0].mean_only_batch_norm.running_mean.is_meta
    _materialize_distributed_module(model, torch.device("cpu"))
    assert torch.equal(model[0].mean_only_batch_norm.running_mean, torch.zeros(3))
    assert torch.isfinite(model(torch.randn(5, 4))).all()


@pytest.mark.parametrize("assign", [True, False])
def test_a_plain_file_gives_meta_layers_their_values(assign):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    apply_weight_norm(model)
    add_mean_only_batch_norm(model)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict(), assign=assign)
    assert torch.equal(model.eval()(X), plain(X))
