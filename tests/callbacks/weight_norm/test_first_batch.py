"""Data-dependent initialization by the callback: when it happens, and that it leaves no trace."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torchmetrics
from helpers.first_batches import NETS, moments_of
from helpers.weight_norm_models import Regression, fit, quiet_trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import DataDependentInitialization, apply_weight_norm


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def initialized(model, batch):
    """What one batch makes of a copy of the model."""
    twin = copy.deepcopy(model)
    apply_weight_norm(twin)
    with DataDependentInitialization(twin):
        twin.net(batch[0])
    return parameters(twin)


class AfterFirstForward(Callback):
    """Keeps the parameters with which the first batch of `fit` was computed."""

    def __init__(self):
        self.found = None
        self.hooks = None

    def on_before_backward(self, trainer, pl_module, loss):
        if self.found is None:
            self.found = parameters(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.hooks = [m for m in pl_module.modules() if m._forward_pre_hooks or m._forward_hooks]


def assert_all_equal(found, expected):
    for p, q in zip(found, expected, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_micro_batch_initializes(accumulate):
    torch.manual_seed(0)
    model, watch = Regression(), AfterFirstForward()
    expected = initialized(model, next(iter(model.data())))
    fit(model, WeightNormCallback(init="data"), watch, accumulate_grad_batches=accumulate)
    assert_all_equal(watch.found, expected)
    assert watch.hooks == []
    assert not torch.equal(next(model.parameters()), expected[0])  # and then it trained


class Whole(Regression):
    """A model of `NETS` that sees one batch."""

    def __init__(self, name):
        torch.manual_seed(0)
        build, shape = NETS[name]
        super().__init__(build())
        self.x = 2 * torch.randn(shape) - 1

    def loss(self, batch):
        return self.net(batch[0]).square().mean()

    def data(self):
        return DataLoader(TensorDataset(self.x), batch_size=len(self.x))

    train_dataloader = val_dataloader = data

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("name", NETS)
def test_after_a_fit_every_unit_has_mean_0_and_variance_1_on_that_batch(name):
    model = Whole(name)
    fit(model, WeightNormCallback(init="data"))
    found = moments_of(model.net, model.x)
    assert found
    for layer, (mean, deviation) in found.items():
        assert mean.abs().max() < 1e-4, layer
        assert (deviation - 1).abs().max() < 1e-3, layer


class Traced(Regression):
    """Shuffles, drops out, has batch normalization, a metric and logs; tells of all of it."""

    def __init__(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
        super().__init__(net)
        self.metric = torchmetrics.MeanMetric()
        self.seen = []
        self.states = []
        self.logged = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logged.append({key: float(value) for key, value in self.trainer.logged_metrics.items()})

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("inputs", self.metric(batch[0].sum()))
        self.log("sum", batch[1].sum())
        self.seen.append(batch[0].clone())
        self.states.append((torch.get_rng_state(), random.getstate()[1], np.random.get_state()[1].tolist()))
        return loss

    def train_dataloader(self):
        return DataLoader(self.data().dataset, batch_size=8, shuffle=True)


def test_no_trace_is_left():
    def run(init):
        model = Traced()
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        trainer = fit(model, WeightNormCallback(init=init), max_epochs=2, log_every_n_steps=1, limit_val_batches=0)
        return model, trainer

    (kept, plain), (set_, trainer) = run("keep"), run("data")
    assert_all_equal(set_.seen, kept.seen)
    for one, other in zip(set_.states, kept.states, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1:] == other[1:]
    assert set_.metric.update_count == kept.metric.update_count
    assert set_.logged == kept.logged
    assert set(kept.logged[0]) == {"inputs", "sum"}
    assert trainer.global_step == plain.global_step
    for name, buffer in kept.net[0].named_buffers():
        assert torch.equal(buffer, set_.net[0].get_buffer(name))
    assert not torch.equal(kept.net[1].parametrizations.weight.original0, set_.net[1].parametrizations.weight.original0)


class Recording(Callback):
    def __init__(self):
        self.before_training = None

    def on_train_start(self, trainer, pl_module):
        self.before_training = parameters(pl_module)


def test_the_sanity_check_does_not_initialize():
    model, watch = Regression(), Recording()
    torch.manual_seed(1)
    plain = copy.deepcopy(model)
    apply_weight_norm(plain)
    fit(model, WeightNormCallback(init="data"), watch, num_sanity_val_steps=2)
    assert_all_equal(watch.before_training, parameters(plain))


def test_resuming_does_not_initialize(tmp_path):
    model = Regression()
    fit(model, WeightNormCallback(init="data"), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    trained = parameters(model)
    fresh, watch = Regression(), AfterFirstForward()
    callback = WeightNormCallback(init="data")
    trainer = quiet_trainer(callback, watch, max_epochs=4)
    trainer.fit(fresh, ckpt_path=tmp_path / "half.ckpt")
    assert_all_equal(watch.found, trained)
    # a checkpoint without a ckpt_path of its own: the next fit of this Trainer starts afresh
    trainer.fit_loop.max_epochs = 6
    another, watch.found = Regression(), None
    expected = initialized(another, next(iter(another.data())))
    trainer.fit(another)
    assert_all_equal(watch.found, expected)


def test_a_second_fit_goes_on_with_what_was_trained():
    model = Regression()
    fit(model, WeightNormCallback(init="data"))
    trained, watch = parameters(model), AfterFirstForward()
    fit(model, WeightNormCallback(init="data"), watch)
    assert_all_equal(watch.found, trained)


@pytest.mark.parametrize("finder_first", [False, True])
@pytest.mark.parametrize(
    "finder", [lambda: LearningRateFinder(num_training_steps=15), lambda: BatchSizeFinder(max_trials=2)]
)
def test_the_finders_run_before_it(tmp_path, finder, finder_first):
    torch.manual_seed(0)
    model, watch = Regression(), AfterFirstForward()
    plain = copy.deepcopy(model)
    callbacks = [WeightNormCallback(init="data"), finder()]
    fit(model, *(callbacks[::-1] if finder_first else callbacks), watch, default_root_dir=tmp_path)
    plain.batch_size = model.batch_size
    assert_all_equal(watch.found, initialized(plain, next(iter(plain.data()))))


def test_averages_are_of_initialized_weights():
    model = Regression()
    model.lr = 0.0
    fit(model, WeightNormCallback(init="data"), WeightAveraging())
    for mean, deviation in moments_of(model.net, next(iter(model.data()))[0]).values():
        assert mean.abs().max() < 1e-4
        assert (deviation - 1).abs().max() < 1e-3


def test_two_callbacks_each_initialize_their_own():
    torch.manual_seed(0)
    model, watch = Regression(), AfterFirstForward()
    expected = initialized(model, next(iter(model.data())))
    fit(model, WeightNormCallback("net.0", init="data"), WeightNormCallback("net.2", init="data"), watch)
    assert_all_equal(watch.found, expected)


class SkipsFirstEpoch(Regression):
    """Skips an epoch, and evaluates at its end."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 else None

    def on_train_epoch_end(self):
        if self.current_epoch == 0:
            assert not self.losses
            self.net(torch.full((8, 4), 100.0))


def test_a_skipped_batch_is_not_the_first_one():
    torch.manual_seed(0)
    model, watch = SkipsFirstEpoch(), AfterFirstForward()
    expected = initialized(model, next(iter(model.data())))
    fit(model, WeightNormCallback(init="data"), watch, max_epochs=2)
    assert_all_equal(watch.found, expected)


class WithSpare(Regression):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


def test_unreached_layers_are_warned_of_once():
    with pytest.warns(UserWarning, match="did not call 'spare', and g and b are as they were") as caught:
        fit(WithSpare(), WeightNormCallback(init="data"), max_epochs=3)
    assert sum("did not call" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*did not call.*")
        fit(WithSpare(), WeightNormCallback(init="data", exclude="spare"))


class Manual(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_manual_optimization_works():
    torch.manual_seed(0)
    model, watch = Manual(), AfterFirstForward()
    expected = initialized(model, next(iter(model.data())))
    fit(model, WeightNormCallback(init="data"), watch)
    assert_all_equal(watch.found, expected)


def test_a_compiled_lightning_module_is_initialized():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, watch = Regression(), AfterFirstForward()
    expected = initialized(model, next(iter(model.data())))
    fit(torch.compile(model, backend="eager"), WeightNormCallback(init="data"), watch)
    assert_all_equal(watch.found, expected)


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


class NoData(Regression):
    def train_dataloader(self):
        return DataLoader(Nothing(), batch_size=4)


class OneByOne(Regression):
    def train_dataloader(self):
        return DataLoader(self.data().dataset, batch_size=1)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (NoData, {}, r"`init=\"data\"`, needs a training batch, but the training data yielded none"),
        (Regression, {"limit_train_batches": 0}, r"needs a training batch.*`limit_train_batches`"),
        (OneByOne, {}, r"each unit of 'net\.0' \(Linear\) has 1 value there.*larger batch"),
    ],
)
def test_data_that_cannot_serve_stops_the_fit_and_nothing_changes(kind, arguments, words):
    model = kind()
    plain = copy.deepcopy(model)
    apply_weight_norm(plain)
    with pytest.raises(ValueError, match=words):
        fit(model, WeightNormCallback(init="data"), **arguments)
    assert_all_equal(parameters(model), parameters(plain))
    assert not any(m._forward_pre_hooks for m in model.modules())
    # and the model can still be trained
    model.train_dataloader = model.data
    fit(model, WeightNormCallback(init="data"))


@pytest.mark.parametrize("arguments", [{"max_epochs": 0}, {"max_steps": 0}])
def test_a_fit_that_is_to_do_nothing_is_no_error(arguments):
    fit(Regression(), WeightNormCallback(init="data"), **arguments)


def test_an_interrupted_first_batch_is_undone():
    class Fails(Regression):
        failing = True

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.failing:
                raise RuntimeError("interrupted")
            return loss

    model = Fails()
    plain = copy.deepcopy(model)
    apply_weight_norm(plain)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(model, WeightNormCallback(init="data"))
    assert_all_equal(parameters(model), parameters(plain))
    model.failing = False
    watch = AfterFirstForward()
    expected = initialized(model, next(iter(model.data())))
    fit(model, WeightNormCallback(init="data"), watch)
    assert_all_equal(watch.found, expected)


def test_a_wrong_init_fails_when_the_callback_is_built():
    with pytest.raises(ValueError, match="`init` got 'random', but it must be \"keep\""):
        WeightNormCallback(init="random")
