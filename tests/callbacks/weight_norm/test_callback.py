"""The life cycle of the callback in one process."""

import copy
import sys
import types

import lightning.pytorch as pl
import pytest
import torch
from helpers.weight_norm_models import Regression, fit, normalized, quiet_trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.nn.utils import parametrizations

from lightning_wn import WeightNormCallback
from lightning_wn.callbacks.weight_norm.checks import require_whole_parameters
from lightning_wn.weight_norm import fold_weight_norm


class Watch(Callback):
    """Compares the weights just before and just after the rewriting."""

    def __init__(self):
        self.weights = []

    def setup(self, trainer, pl_module, stage):
        self.weights.append([m.weight.detach().clone() for m in pl_module.net if hasattr(m, "weight")])


def test_fit_trains_g_and_v_from_the_same_function():
    before, after = Watch(), Watch()
    model = Regression()
    trainer = fit(model, before, WeightNormCallback(), after)
    assert normalized(model) == ["net.0", "net.2"]
    for plain, rewritten in zip(before.weights[0], after.weights[0], strict=True):
        assert torch.equal(plain, rewritten)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for layer, start in zip((model.net[0], model.net[2]), after.weights[0], strict=True):
        g, v = (getattr(layer.parametrizations.weight, f"original{i}") for i in range(2))
        assert not torch.equal(v, start)
        assert not torch.equal(g, start.norm(dim=1, keepdim=True))


def test_losses_are_those_of_torchs_weight_norm():
    torch.manual_seed(1)
    ours = Regression().double()
    theirs = copy.deepcopy(ours)
    for i in (0, 2):
        parametrizations.weight_norm(theirs.net[i])
    trainers = {"max_epochs": 5, "precision": "64-true"}
    fit(ours, WeightNormCallback(), **trainers)
    fit(theirs, **trainers)
    # the same formula in another order of operations, in float64
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=1e-9, atol=1e-12)
    assert ours.losses[-1] < ours.losses[0]


def test_selection_is_passed_on(monkeypatch):
    said = []
    # under which logger's name it goes depends on Lightning's version
    monkeypatch.setattr("lightning_wn.callbacks.weight_norm.callback.rank_zero_info", said.append)
    model = Regression()
    fit(model, WeightNormCallback("net.*", exclude="net.2"))
    assert normalized(model) == ["net.0"]
    assert said == ["WeightNormCallback weight-normalized 1 of the model's layers."]


@pytest.mark.parametrize("argument", ["modules", "exclude"])
def test_a_wrong_argument_fails_when_the_callback_is_built(argument):
    with pytest.raises(TypeError, match=f"`{argument}` got 3, but each entry must be"):
        WeightNormCallback(**{argument: 3})


@pytest.mark.parametrize("arguments", [{"modules": "nett.*"}, {"exclude": "nett.*"}])
def test_a_pattern_that_matches_nothing_stops_the_fit(arguments):
    with pytest.raises(ValueError, match=r"`(modules|exclude)='nett\.\*'` matches no module of Regression") as error:
        fit(Regression(), WeightNormCallback(**arguments))
    assert "build them in `__init__` or `configure_model`" in str(error.value)


class MyAveraging(WeightAveraging):
    pass


@pytest.mark.parametrize("averaging", [WeightAveraging, MyAveraging, lambda: StochasticWeightAveraging(swa_lrs=0.01)])
def test_averaging_goes_behind(averaging):
    name = type(averaging()).__name__
    with pytest.raises(ValueError, match=f"{name} is listed before WeightNormCallback") as error:
        fit(Regression(), averaging(), WeightNormCallback())
    assert "list WeightNormCallback first" in str(error.value)
    model = Regression()
    fit(model, WeightNormCallback(), averaging(), max_epochs=3)
    assert normalized(model) == ["net.0", "net.2"]
    # where nothing is left to rewrite, the order does not matter
    fit(model, averaging(), WeightNormCallback(), max_epochs=3)


def test_averaged_g_and_v_are_what_the_model_ends_with():
    model = Regression()
    trail = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trail.append([p.detach().clone() for p in pl_module.parameters()])

    fit(model, WeightNormCallback(), Record(), WeightAveraging(), max_epochs=2, limit_val_batches=0)
    for i, p in enumerate(model.parameters()):
        torch.testing.assert_close(p.detach(), torch.stack([step[i] for step in trail]).mean(0))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_sharding_strategies_are_refused(strategy):
    trainer = types.SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(ValueError, match=f"does not work with {strategy.__name__}.*use a single device or a DDP"):
        require_whole_parameters(trainer)


def test_a_trainer_of_the_other_package_is_refused(monkeypatch):
    module = types.ModuleType("pytorch_lightning.trainer.trainer")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    trainer = type("Trainer", (), {"__module__": module.__name__})()
    with pytest.raises(TypeError, match=r"import lightning\.pytorch as pl"):
        WeightNormCallback().setup(trainer, Regression(), "fit")


def test_a_second_fit_goes_on_with_the_same_parameters():
    model = Regression()
    fit(model, WeightNormCallback())
    before = list(model.parameters())
    losses = len(model.losses)
    fit(model, WeightNormCallback())
    assert len(model.losses) > losses
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    trainer = quiet_trainer(WeightNormCallback())
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)


def test_a_fit_after_a_failed_one_works():
    class Fails(Regression):
        failing = True

        def training_step(self, batch, batch_idx):
            if self.failing and batch_idx == 2:
                raise RuntimeError("interrupted")
            return super().training_step(batch, batch_idx)

    model, callback = Fails(), WeightNormCallback()
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(model, callback)
    model.failing = False
    fit(model, callback)
    assert normalized(model) == ["net.0", "net.2"]


def test_resuming_equals_an_uninterrupted_run(tmp_path):
    torch.manual_seed(0)
    whole = Regression()
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    fit(whole, WeightNormCallback(), max_epochs=4)
    fit(first, WeightNormCallback(), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    quiet_trainer(WeightNormCallback(), max_epochs=4).fit(second, ckpt_path=tmp_path / "half.ckpt")
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_evaluation_after_fit_and_from_the_best_checkpoint(tmp_path):
    model = Regression()
    trainer = quiet_trainer(
        WeightNormCallback(),
        ModelCheckpoint(tmp_path, monitor="val_loss"),
        enable_checkpointing=True,
        max_epochs=3,
    )
    trainer.fit(model)
    trained = trainer.test(model, verbose=False)
    assert trainer.validate(model, verbose=False)
    outputs = torch.cat(trainer.predict(model))
    assert normalized(model) == ["net.0", "net.2"]
    assert trainer.test(ckpt_path="best", verbose=False) == trained
    # a new process: plain model, this callback, the file of g and v
    fresh = Regression()
    new_trainer = quiet_trainer(WeightNormCallback())
    best = trainer.checkpoint_callback.best_model_path
    torch.testing.assert_close(torch.cat(new_trainer.predict(fresh, ckpt_path=best)), outputs, rtol=0, atol=0)
    assert normalized(fresh) == []
    assert torch.equal(fresh.net[0].weight, model.net[0].weight)
    assert new_trainer.test(fresh, ckpt_path=best, verbose=False) == trained
    assert not fresh.net[0]._load_state_dict_pre_hooks  # nothing stays behind


def test_a_plain_checkpoint_is_evaluated_as_ever(tmp_path):
    plain = Regression()
    fit(plain).save_checkpoint(tmp_path / "plain.ckpt")
    model = Regression()
    quiet_trainer(WeightNormCallback()).test(model, ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert torch.equal(model.net[0].weight, plain.net[0].weight)


def test_load_hooks_do_not_outlive_a_failed_evaluation():
    class Fails(Regression):
        def test_step(self, batch, batch_idx):
            raise RuntimeError("interrupted")

    model = Fails()
    with pytest.raises(RuntimeError, match="interrupted"):
        quiet_trainer(WeightNormCallback()).test(model)
    assert not model.net[0]._load_state_dict_pre_hooks


def test_frozen_weights_stay_as_they_are():
    model = Regression()
    model.net[0].weight.requires_grad_(False)
    before = model.net[0].weight.detach().clone()
    fit(model, WeightNormCallback())
    assert torch.equal(model.net[0].weight, before)


def test_the_learning_rate_finder_and_the_batch_size_finder_work(tmp_path):
    model = Regression()
    finder = LearningRateFinder(num_training_steps=20)
    fit(model, WeightNormCallback(), finder, default_root_dir=tmp_path)
    assert finder.optimal_lr is not None
    assert normalized(model) == ["net.0", "net.2"]
    model = Regression()
    fit(model, WeightNormCallback(), BatchSizeFinder(max_trials=2), default_root_dir=tmp_path)
    assert normalized(model) == ["net.0", "net.2"]


@pytest.mark.parametrize("first", [True, False])
def test_a_backbone_unfrozen_later_trains_its_g_and_v(first):
    class WithBackbone(Regression):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(4, 4)

        def loss(self, batch):
            x, y = batch
            return nn.functional.mse_loss(self.net(self.backbone(x)), y)

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    model = WithBackbone()
    callbacks = [WeightNormCallback(), BackboneFinetuning(unfreeze_backbone_at_epoch=1)]
    trainer = fit(model, *(callbacks if first else callbacks[::-1]), max_epochs=3)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_two_callbacks_share_a_trainer():
    model = Regression()
    fit(model, WeightNormCallback("net.0"), WeightNormCallback("net.2"))
    assert normalized(model) == ["net.0", "net.2"]


def test_layers_already_parametrized_are_no_concern_of_the_checks():
    model = Regression()
    parametrizations.weight_norm(model.net[0])
    fit(model, WeightNormCallback())
    assert normalized(model) == ["net.2"]


def test_tied_weights_train_tied():
    class Tied(Regression):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)))
            self.net[2].weight = self.net[0].weight

    model = Tied()
    fit(model, WeightNormCallback())
    assert torch.equal(model.net[0].weight, model.net[2].weight)
    fold_weight_norm(model)
    assert model.net[0].weight is model.net[2].weight


def test_a_barebones_trainer_works():
    model = Regression()
    pl.Trainer(barebones=True, max_epochs=1, callbacks=[WeightNormCallback()], accelerator="cpu", devices=1).fit(model)
    assert normalized(model) == ["net.0", "net.2"]


def test_two_callbacks_that_save_the_model_differently_are_refused():
    callbacks = [WeightNormCallback("net.0"), WeightNormCallback("net.2", checkpoint="parametrized")]
    with pytest.raises(ValueError, match=r'Two callbacks ask for `checkpoint="folded"`.*give all of them the same'):
        fit(Regression(), *callbacks)
