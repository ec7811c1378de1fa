"""The life cycle of the callback in one process."""

import copy
import logging
import sys
import types

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
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
from weight_norm_models import Regression, quiet_trainer

from lightning_wn.weight_norm import WeightNormCallback, apply_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.callback import _refuse_sharding
from lightning_wn.weight_norm.reparametrization import weight_norm_of


def normalized(model):
    return [name for name, module in model.named_modules() if weight_norm_of(module)]


def fit(model, *callbacks, **kwargs):
    trainer = quiet_trainer(*callbacks, **kwargs)
    trainer.fit(model)
    return trainer


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


def test_selection_is_passed_on(caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        model = Regression()
        fit(model, WeightNormCallback("net.*", exclude="net.2"))
    assert normalized(model) == ["net.0"]
    assert "WeightNormCallback: 1 layers are now weight-normalized" in caplog.text


@pytest.mark.parametrize("argument", ["modules", "exclude"])
def test_a_wrong_argument_fails_when_the_callback_is_built(argument):
    with pytest.raises(TypeError, match=f"`{argument}` got 3, but each entry must be"):
        WeightNormCallback(**{argument: 3})


@pytest.mark.parametrize("arguments", [{"modules": "nett.*"}, {"exclude": "nett.*"}])
def test_a_pattern_that_matches_nothing_stops_the_fit(arguments):
    with pytest.raises(ValueError, match=r"`(modules|exclude)='nett\.\*'` matches no module of Regression"):
        fit(Regression(), WeightNormCallback(**arguments))


class BuiltIn(Regression):
    """Builds its layers in the hook of this name."""

    where = "configure_model"

    def __init__(self):
        super().__init__(nn.Identity())
        self.calls = 0

    def build(self):
        self.calls += 1
        if isinstance(self.net, nn.Identity):
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


class BuiltInConfigureModel(BuiltIn):
    def configure_model(self):
        self.build()


class BuiltInSetup(BuiltIn):
    def setup(self, stage):
        self.build()


class NormalizedInSetup(BuiltIn):
    def setup(self, stage):
        self.build()
        apply_weight_norm(self)


class PartlyBuiltInSetup(Regression):
    def setup(self, stage):
        self.extra = nn.Linear(2, 2)

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.extra(self.net(x)), y)


class BuiltInOnFitStart(PartlyBuiltInSetup):
    def setup(self, stage):
        pass

    def on_fit_start(self):
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("modules", [None, "net.*"])
def test_layers_built_in_configure_model_are_normalized(modules):
    model = BuiltInConfigureModel()
    trainer = fit(model, WeightNormCallback(modules))
    assert normalized(model) == ["net.0", "net.2"]
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert model.calls == 2  # once by the callback, once by Lightning


def test_configure_model_runs_in_the_trainers_contexts():
    class Halved(BuiltInConfigureModel):
        def loss(self, batch):
            return super().loss([t.to(torch.bfloat16) for t in batch])

        def build(self):
            super().build()
            self.dtype_in_hook = torch.get_default_dtype()

    model = Halved()
    fit(model, WeightNormCallback(), precision="bf16-true")
    assert model.dtype_in_hook == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("modules", [None, "net.*"])
def test_layers_built_in_setup_are_refused_with_the_fix(modules):
    with pytest.raises(ValueError, match="would train without weight normalization") as error:
        fit(BuiltInSetup(), WeightNormCallback(modules))
    for word in ("'net.0' (Linear)", "'net.2' (Linear)", "configure_model", "apply_weight_norm(self)"):
        assert word in str(error.value)


@pytest.mark.parametrize("kind", [PartlyBuiltInSetup, BuiltInOnFitStart])
def test_one_late_layer_is_enough_to_refuse(kind):
    with pytest.raises(ValueError, match=r"'extra' \(Linear\) would train without") as error:
        fit(kind(), WeightNormCallback())
    assert "net.0" not in str(error.value)


def test_an_excluded_late_layer_is_legal():
    class Split(PartlyBuiltInSetup):
        pass

    model = Split()
    fit(model, WeightNormCallback(exclude="extra"))
    assert normalized(model) == ["net.0", "net.2"]


def test_setup_may_normalize_its_layers_itself():
    model = NormalizedInSetup()
    fit(model, WeightNormCallback())
    assert normalized(model) == ["net.0", "net.2"]


class EarlyOptimizer(Regression):
    def __init__(self):
        super().__init__()
        self.early = list(self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.early, lr=0.1)


class WeightsByName(Regression):
    def configure_optimizers(self):
        named = dict(self.named_parameters())
        decay = [p for n, p in named.items() if n.endswith(".weight")]
        rest = [p for n, p in named.items() if n.endswith(".bias")]
        return torch.optim.SGD([{"params": decay, "weight_decay": 0.1}, {"params": rest}], lr=0.1)


class TwoOptimizers(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


class LeavesOneOut(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)


class ForeignParameter(Regression):
    def configure_optimizers(self):
        self.scales = [nn.Parameter(torch.zeros(()))]
        return torch.optim.SGD([*self.parameters(), *self.scales], lr=0.1)


class NoOptimizer(Regression):
    def configure_optimizers(self):
        return None


def test_an_optimizer_of_replaced_weights_is_refused():
    with pytest.raises(ValueError, match="An optimizer holds the plain weight of") as error:
        fit(EarlyOptimizer(), WeightNormCallback())
    for word in ("'net.0' (Linear)", "'net.2' (Linear)", "inside `configure_optimizers`", "`__init__`"):
        assert word in str(error.value)


def test_groups_by_name_that_lose_g_and_v_are_refused():
    with pytest.raises(ValueError, match="No optimizer holds the trainable") as error:
        fit(WeightsByName(), WeightNormCallback())
    for word in ("g of 'net.0' (Linear)", "v of 'net.0' (Linear)", "parametrizations.weight", "`exclude`"):
        assert word in str(error.value)


def test_a_layer_in_no_optimizer_is_refused_until_excluded_or_frozen():
    with pytest.raises(ValueError, match=r"No optimizer holds the trainable g of 'net\.0'"):
        fit(LeavesOneOut(), WeightNormCallback())
    fit(LeavesOneOut(), WeightNormCallback(exclude="net.0"))
    model = LeavesOneOut()
    model.net[0].requires_grad_(False)
    fit(model, WeightNormCallback())
    assert not model.net[0].parametrizations.weight.original0.requires_grad


@pytest.mark.parametrize("kind", [TwoOptimizers, ForeignParameter])
def test_legal_optimizers_pass(kind):
    model = kind()
    fit(model, WeightNormCallback())
    assert normalized(model) == ["net.0", "net.2"]


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")
def test_a_fit_without_optimizer_passes():
    fit(NoOptimizer(), WeightNormCallback())


class MyAveraging(WeightAveraging):
    pass


@pytest.mark.parametrize(
    "averaging", [WeightAveraging, MyAveraging, lambda: StochasticWeightAveraging(swa_lrs=0.01)]
)
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
    with pytest.raises(
        ValueError, match=f"does not work with {strategy.__name__}.*use a single device or a DDP"
    ):
        _refuse_sharding(trainer)


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
    pl.Trainer(
        barebones=True, max_epochs=1, callbacks=[WeightNormCallback()], accelerator="cpu", devices=1
    ).fit(model)
    assert normalized(model) == ["net.0", "net.2"]
