"""What `GradientNoiseScaleCallback` sees of a real run, and makes of it."""

import math
import sys
from functools import partial

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader
from lightning.pytorch.callbacks import Callback

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.callbacks.noise_scale.run_timer import RunTimer


class Clock(Callback):
    """A clock that only the parts of a run move, each by what it takes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def on_before_backward(self, *args):
        self.now += 0.5

    def on_before_zero_grad(self, *args):
        self.now += 0.01

    def on_train_batch_end(self, *args):
        self.now += 0.125

    def on_validation_start(self, *args):
        self.now += 1000.0


class WithValidation(DigitsMLP):
    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return loader(digits(16), 16)


def fit(model, callbacks, **settings):
    settings = QUIET | {"max_steps": 60, "accumulate_grad_batches": 4} | settings
    trainer = L.Trainer(callbacks=callbacks, **settings)
    trainer.fit(model, loader(digits(512), 16))
    return trainer


# an epoch of 32 micro-batches: with 5 in a step, every seventh step is short
@pytest.mark.parametrize(("accumulate", "short"), [(1, 1000), (4, 1000), (5, 7)])
def test_times_of_a_real_run(accumulate, short, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lightning_wn.callbacks.noise_scale.run_watch.RunTimer", partial(RunTimer, clock=clock))
    callback = GradientNoiseScaleCallback(every_n_steps=3)
    fit(WithValidation(), [callback, clock], accumulate_grad_batches=accumulate)
    advice = callback.advise()
    time = advice.run.time
    # gradients are zeroed once a step; validation is no part of either
    assert time.seconds(accumulate) == pytest.approx(accumulate * 0.625 + 0.01)
    assert (time.is_split, time.includes_measuring) == (True, False)
    # by example, the next batch is taken for a check of each measured step, in the time of the step that it belongs to
    busy = (0, 1) if accumulate == 1 else (0,)
    # without the first five, the measured and the short ones
    assert time.num_steps == sum(step % 3 not in busy and step % short != short - 1 for step in range(5, 60))
    (now,) = (candidate for candidate in advice.candidates if candidate.batch_size == advice.estimate.batch_size)
    assert now.hours.value == pytest.approx(60 * time.seconds(accumulate) / 3600)


def test_every_step_measured_is_said():
    callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0)
    fit(DigitsMLP(), [callback])
    assert callback.advise().run.time.includes_measuring
    assert "measuring included" in str(callback.advise())


@pytest.mark.parametrize(("name", "rule"), [("SGD", "sgd"), ("AdamW", "adam")])
def test_knows_the_optimizer_and_the_length_of_the_run(name, rule):
    callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0)
    fit(DigitsMLP(optimizer=name), [callback])
    advice = callback.advise(target=0.5, price_per_device_hour=3.0)
    assert (advice.run.optimizer, advice.run.optimizer_family) == (name, rule)
    assert (advice.run.num_steps, advice.run.planned_steps) == (60, 60)
    assert advice.run.micro_batches_per_epoch == 32
    assert (advice.run.every_n_steps, advice.run.ema_decay) == (1, 1.0)
    assert advice.target == 0.5
    assert f"{name}'s learning rate x" in str(advice)
    assert advice.candidates[0].cost.value > 0
    # the summary at the end of the fit and the log are of target 1
    assert callback.advise().suggested_batch_size > advice.suggested_batch_size


def test_a_warm_up_is_seen_while_it_lasts():
    class WarmUp(DigitsMLP):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    for steps, rises in ((8, True), (40, False)):
        callback = GradientNoiseScaleCallback(every_n_steps=1)
        fit(WarmUp(lr=0.1), [callback], max_steps=steps)
        assert callback.advise().run.learning_rate_rises is rises


def test_a_run_without_an_end_and_manual_optimization_have_no_times_to_a_loss():
    class Stopper(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 3

    class Plan(Callback):
        planned = 0.0

        def on_train_batch_end(self, trainer, *args):
            self.planned = callback.advise().run.planned_steps

    callback, plan = GradientNoiseScaleCallback(every_n_steps=1), Plan()
    fit(DigitsMLP(), [callback, Stopper(), plan], max_steps=-1, max_epochs=-1)
    assert math.isinf(plan.planned)
    assert callback.advise().run.planned_steps == 3, "it has ended"

    class Manual(DigitsMLP):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    callback = GradientNoiseScaleCallback(every_n_steps=1)
    fit(Manual(), [callback], accumulate_grad_batches=1)
    run = callback.advise().run
    assert (run.time, run.optimizer, run.num_steps) == (None, "SGD", 60)


def test_without_matplotlib_the_error_comes_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    model = DigitsMLP(lr=0.1)
    before = model.net[0].weight.clone()
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-wn\[plots\]"'):
        fit(model, [GradientNoiseScaleCallback(log_figure=True)])
    assert torch.equal(model.net[0].weight, before)
