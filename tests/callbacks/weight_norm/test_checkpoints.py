"""Checkpoints hold plain weights and resume exactly; what does not fit is refused in words."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers.weight_norm_models import Regression, fit, normalized, quiet_trainer
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.nn.utils import parametrizations

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm

NAMES = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]


class Adam(Regression):
    """Has a state for every parameter."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Configured(Adam):
    """Weight-normalizes itself, so that callbacks may stand in any order."""

    def configure_model(self):
        apply_weight_norm(self)


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def read(kind, saver):
    """How a Trainer reads the last checkpoint; on Python 3.10, that of SWA holds more than torch calls safe."""
    return {"ckpt_path": saver.last_model_path, "weights_only": kind != "swa"}


CALLBACKS = {
    "alone": (Adam, lambda **k: [WeightNormCallback(**k)]),
    "average behind": (Adam, lambda **k: [WeightNormCallback(**k), WeightAveraging()]),
    "ema behind": (Adam, lambda **k: [WeightNormCallback(**k), EMAWeightAveraging(decay=0.8)]),
    "average before": (Configured, lambda **k: [EMAWeightAveraging(decay=0.8), WeightNormCallback(**k)]),
    "swa": (Adam, lambda **k: [WeightNormCallback(**k), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]),
}


@pytest.mark.parametrize("form", ["folded", "parametrized"])
@pytest.mark.parametrize("kind", CALLBACKS)
def test_resuming_equals_an_uninterrupted_run(tmp_path, kind, form):
    build, callbacks = CALLBACKS[kind]
    torch.manual_seed(0)
    whole = build()
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    fit(whole, *callbacks(checkpoint=form), max_epochs=4)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    options = {"max_epochs": 4, "enable_checkpointing": True}

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    fit(first, *callbacks(checkpoint=form), saver, Stop(), **options)
    saved = torch.load(saver.last_model_path, weights_only=kind != "swa")
    assert saved["epoch"] == 1
    assert (list(saved["state_dict"]) == NAMES) == (form == "folded")
    assert ("weight_norm" in saved) == (form == "folded")
    quiet_trainer(*callbacks(checkpoint=form), max_epochs=4).fit(second, **read(kind, saver))
    assert second.losses == whole.losses[len(whole.losses) - len(second.losses) :]
    assert len(second.losses) == 8
    assert_equal(parameters(whole), parameters(second))


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_checkpoint_loads_into_the_plain_model(tmp_path, kind, weights_only):
    build, callbacks = CALLBACKS[kind]
    saver = ModelCheckpoint(tmp_path, save_last=True, save_weights_only=weights_only)
    model = build()
    fit(model, *callbacks(), saver, max_epochs=3, enable_checkpointing=True)
    file = torch.load(saver.last_model_path, weights_only=kind != "swa")
    assert list(file["state_dict"]) == NAMES
    plain = Regression()
    plain.load_state_dict(file["state_dict"])
    x = torch.randn(7, 4)
    # Lightning puts an average into the model behind the last checkpoint, and into full checkpoints only
    if kind == "alone" or (kind != "swa" and not weights_only):
        torch.testing.assert_close(plain.net(x), model.net(x), rtol=1e-6, atol=1e-6)
    loaded = Regression.load_from_checkpoint(saver.last_model_path, strict=True, weights_only=kind != "swa")
    assert torch.equal(loaded.net(x), plain.net(x))
    fresh = quiet_trainer().test(Regression(), **read(kind, saver), verbose=False)
    assert fresh == quiet_trainer(WeightNormCallback()).test(Regression(), **read(kind, saver), verbose=False)
    # into a model that is weight-normalized; through a decomposition, so bit for bit too
    other = Configured()
    assert quiet_trainer(*callbacks()).test(other, **read(kind, saver), verbose=False) == fresh
    assert torch.equal(other.net(x), plain.net(x))


def test_what_others_see_of_the_model_is_plain_weights():
    model = Regression()
    plain = list(model.state_dict())
    fit(model, WeightNormCallback())
    assert list(model.state_dict()) == plain
    fit(model, WeightNormCallback(checkpoint="parametrized"))
    assert "net.0.parametrizations.weight.original0" in model.state_dict()


def test_fold_on_fit_end(tmp_path):
    model = Regression()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(model, WeightNormCallback(fold_on_fit_end=True), saver, enable_checkpointing=True)
    assert normalized(model) == []
    assert [type(layer).__name__ for layer in model.net] == ["Linear", "Tanh", "Linear"]
    trained = trainer.test(model, verbose=False)
    assert trainer.test(model, ckpt_path=saver.last_model_path, verbose=False) == trained
    fit(model, WeightNormCallback(fold_on_fit_end=True), max_epochs=1)
    assert normalized(model) == []


def test_the_learning_rate_finder_brings_g_and_v_back_bit_for_bit(tmp_path):
    found = {}

    class Look(Callback):
        def __init__(self, name):
            self.name = name

        def on_fit_start(self, trainer, pl_module):
            found[self.name] = parameters(pl_module)

    class Stretch(Callback):
        """Makes ‖v‖ another number than g, as after some training."""

        def on_fit_start(self, trainer, pl_module):
            pl_module.net[0].parametrizations.weight.original1.data.mul_(3)

    finder = LearningRateFinder(num_training_steps=10)
    fit(Regression(), WeightNormCallback(), Stretch(), Look(0), finder, Look(1), default_root_dir=tmp_path)
    assert_equal(found[0], found[1])


def test_weights_edited_in_the_file_win(tmp_path):
    model = Adam()
    trainer = fit(model, WeightNormCallback())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    file = torch.load(tmp_path / "last.ckpt", weights_only=True)
    file["state_dict"]["net.0.weight"] *= 2
    torch.save(file, tmp_path / "edited.ckpt")
    other = Adam()
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["weight"] = pl_module.net[0].weight.detach().clone()

    trainer = quiet_trainer(WeightNormCallback(), Look(), max_epochs=2)
    with pytest.warns(UserWarning, match=r"g and v of net\.0\.weight that are not those of its weights"):
        trainer.fit(other, ckpt_path=tmp_path / "edited.ckpt")
    assert torch.equal(seen["weight"], file["state_dict"]["net.0.weight"])


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_of_other_shapes_is_refused_and_nothing_changes(tmp_path, stage):
    wide = Regression(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    wide.loss = lambda batch: wide.net(batch[0]).square().mean()
    fit(wide, WeightNormCallback()).save_checkpoint(tmp_path / "wide.ckpt")
    model = Regression()
    apply_weight_norm(model)
    before = parameters(model)
    trainer = quiet_trainer(WeightNormCallback(), max_epochs=2)
    with pytest.raises(ValueError, match="does not fit the weight-normalized Regression") as error:
        getattr(trainer, stage)(model, ckpt_path=tmp_path / "wide.ckpt")
    assert "'net.2.weight' has the shape (3, 8), not (2, 8)" in str(error.value)
    assert_equal(parameters(model), before)
    assert not model._load_state_dict_pre_hooks


class Transposed(Adam):
    """Its g is over inputs in torch's weight norm, and over outputs in ours."""

    def __init__(self, by=None):
        super().__init__(nn.Sequential(nn.Unflatten(1, (4, 1)), nn.ConvTranspose1d(4, 2, 1), nn.Flatten()))
        if by is not None:
            by(self.net[1])


@pytest.mark.parametrize("by", [parametrizations.weight_norm, None])
def test_optimizer_state_of_another_model_is_refused(tmp_path, by):
    other = Transposed(by)
    fit(other).save_checkpoint(tmp_path / "other.ckpt")
    words = "over other dimensions: g of 'net.1.weight'" if by else "had no g and v"
    model = Transposed()
    with pytest.raises(ValueError, match=words) as error:
        quiet_trainer(WeightNormCallback(), max_epochs=2).fit(model, ckpt_path=tmp_path / "other.ckpt")
    assert 'load them by `model.load_state_dict(torch.load(path)["state_dict"])`' in str(error.value)
    # and the fix works
    model = Transposed()
    apply_weight_norm(model)
    model.load_state_dict(torch.load(tmp_path / "other.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(model.net[1].weight, other.net[1].weight)
    fit(model, WeightNormCallback())


@pytest.mark.parametrize("form", ["folded", "parametrized"])
def test_optimizer_state_of_one_norm_per_weight_is_refused(tmp_path, form):
    fit(Adam(), WeightNormCallback(dim=None, checkpoint=form)).save_checkpoint(tmp_path / "other.ckpt")
    model = Adam()
    with pytest.raises(
        ValueError, match=r"over other dimensions: g of 'net\.0\.weight' \(\(\) in the checkpoint, \(8, 1\)"
    ):
        quiet_trainer(WeightNormCallback(checkpoint=form), max_epochs=2).fit(model, ckpt_path=tmp_path / "other.ckpt")


def test_torchs_parametrization_is_read_by_a_plain_model_in_evaluation(tmp_path):
    other = Transposed(parametrizations.weight_norm)
    fit(other).save_checkpoint(tmp_path / "other.ckpt")
    model = Transposed()
    quiet_trainer(WeightNormCallback()).test(model, ckpt_path=tmp_path / "other.ckpt", verbose=False)
    torch.testing.assert_close(model.net[1].weight, other.net[1].weight)


def test_tied_weights_stay_tied_through_a_checkpoint(tmp_path):
    class Tied(Adam):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)))
            self.net[2].weight = self.net[0].weight

    model = Tied()
    fit(model, WeightNormCallback()).save_checkpoint(tmp_path / "tied.ckpt")
    again = Tied()
    quiet_trainer(WeightNormCallback(), max_epochs=2).fit(again, ckpt_path=tmp_path / "tied.ckpt")
    assert torch.equal(again.net[0].weight, again.net[2].weight)
    assert len(list(again.parameters())) == 7
    fold_weight_norm(again)
    assert again.net[0].weight is again.net[2].weight


@pytest.mark.parametrize(("argument", "value"), [("checkpoint", "plain"), ("log_signals", "often")])
def test_a_wrong_argument_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be .*got '{value}'"):
        WeightNormCallback(**{argument: value})


def test_a_compiled_module_saves_plain_weights(tmp_path):
    model = Regression()
    model.net = torch.compile(model.net, backend="eager")
    names = list(model.state_dict())
    trainer = fit(model, WeightNormCallback())
    trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    assert list(torch.load(tmp_path / "compiled.ckpt", weights_only=True)["state_dict"]) == names


def test_a_summary_is_printed_and_batch_norm_is_synchronised(capsys):
    model = Regression(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    options = {"enable_model_summary": True, "sync_batchnorm": True, "strategy": "ddp", "devices": 1}
    trainer = quiet_trainer(WeightNormCallback(), **options)
    assert trainer.strategy is not None
    pl.callbacks.ModelSummary(max_depth=2).on_fit_start(trainer, model)
    count = pl.utilities.model_summary.summarize(model).total_parameters
    apply_weight_norm(model)
    assert pl.utilities.model_summary.summarize(model).total_parameters == count + 10  # one g a unit
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model.net)
    assert normalized(converted) == ["0", "2"]
