"""Signals are logged at the steps at which Lightning logs what the model logs beside them, and at no others."""

import pytest
import torch
from helpers.weight_norm_models import Regression, quiet_trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from lightning_wn import GradientNoiseScaleCallback, WeightNormCallback


class Keep(Logger):
    """Keeps the steps at which each number comes."""

    name, version = "keep", 0

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        for key in metrics:
            self.steps.setdefault(key, []).append(step)


class Logging(Regression):
    """11 batches an epoch; logs its loss itself. ``skips`` names the batches without one to train on."""

    def __init__(self, skips=(), stops_at=None):
        super().__init__()
        self.batch_size = 3
        self.skips, self.stops_at = skips, stops_at

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        if batch_idx == self.stops_at:
            self.trainer.should_stop = True
        return None if batch_idx in self.skips else loss


class ByHand(Logging):
    """Several optimizers; ``frequencies`` says every how many batches each of them steps."""

    def __init__(self, frequencies=(1, 1), **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.frequencies = frequencies

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if loss is None:
            return
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        for optimizer, every in zip(optimizers, self.frequencies, strict=True):
            if (batch_idx + 1) % every == 0:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), lr=0.01) for _ in self.frequencies]


def steps_of(logger):
    return tuple(logger.steps.get(key, []) for key in ("weight_norm/g_mean", "loss"))


def logged(model, *callbacks, ckpt_path=None, **settings):
    logger = Keep()
    settings = {"max_epochs": 2, "log_every_n_steps": 3, "limit_val_batches": 0} | settings
    trainer = quiet_trainer(WeightNormCallback(log_signals=True), *callbacks, logger=logger, **settings)
    trainer.fit(model, ckpt_path=ckpt_path)
    return steps_of(logger)


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        (Logging, {}, [2, 5, 8, 11, 14, 17, 20]),
        (lambda: Logging(skips=(2, 3, 7)), {}, [2, 5, 8, 11, 14, 17, 20]),
        (Logging, {"log_every_n_steps": 1, "max_epochs": 1}, list(range(11))),
        (Logging, {"log_every_n_steps": 23}, []),
        (Logging, {"log_every_n_steps": 0, "max_epochs": 5}, []),
        # windows of 4, 4 and 3 micro-batches
        (Logging, {"accumulate_grad_batches": 4, "log_every_n_steps": 1}, [0, 1, 2, 3, 4, 5]),
        (Logging, {"accumulate_grad_batches": 4, "log_every_n_steps": 2}, [1, 3, 5]),
        (lambda: Logging(skips=(2, 3)), {"accumulate_grad_batches": 4, "log_every_n_steps": 2}, [1, 3, 5]),
        (lambda: Logging(stops_at=3), {}, [2, 3]),
        (lambda: ByHand((1,)), {}, [2, 5, 8, 11, 14, 17, 20]),
        (ByHand, {}, [2, 5, 8, 11, 14, 17, 20]),
        (lambda: ByHand((1, 1, 1)), {"log_every_n_steps": 4}, [3, 7, 11, 15, 19]),
        (lambda: ByHand((1, 5)), {}, [2, 5, 8, 11, 14, 17, 20]),
        (lambda: ByHand((4,)), {}, [2, 5, 8, 11, 14, 17, 20]),
        (lambda: ByHand(skips=(0, 1, 2, 5)), {}, [2, 5, 8, 11, 14, 17, 20]),
        (ByHand, {"log_every_n_steps": 0}, []),
        (ByHand, {"log_every_n_steps": 23}, []),
    ],
)
def test_signals_are_logged_where_the_models_own_numbers_are(model, settings, expected):
    own, theirs = logged(model(), **settings)
    assert own == theirs == expected


def test_they_follow_a_schedule_of_accumulation():
    own, theirs = logged(Logging(), GradientAccumulationScheduler({0: 1, 1: 4}), log_every_n_steps=2)
    assert own == theirs == [1, 3, 5, 7, 9, 11, 13]


@pytest.mark.parametrize("model", [Logging, ByHand])
@pytest.mark.parametrize("when", [{"every_n_train_steps": 4}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}])
def test_a_resumed_run_goes_on_at_the_same_steps(tmp_path, model, when):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, **when)
    logged(model(), saver, enable_checkpointing=True)
    path = sorted(tmp_path.glob("*.ckpt"), key=lambda file: file.stat().st_mtime)[0]
    own, theirs = logged(model(), ckpt_path=path, max_epochs=3)
    assert own == theirs
    assert own


@pytest.mark.parametrize("model", [Logging, ByHand])
def test_a_second_fit_goes_on_counting(model):
    logger = Keep()
    trainer = quiet_trainer(
        WeightNormCallback(log_signals=True), logger=logger, log_every_n_steps=3, limit_val_batches=0
    )
    module = model()
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    own, theirs = steps_of(logger)
    assert own == theirs == [2, 5, 8, 11, 14, 17, 20]
    # another Trainer begins anew
    own, theirs = logged(module, max_epochs=1)
    assert own == theirs == [2, 5, 8]


def test_the_noise_scale_is_logged_at_the_same_steps():
    class Two(ByHand):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.01) for i in (0, 2)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            self.log("loss", loss)

    logger = Keep()
    noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
    quiet_trainer(WeightNormCallback(log_signals=True), noise_scale, logger=logger, log_every_n_steps=5).fit(Two())
    assert logger.steps["weight_norm/g_mean"] == logger.steps["loss"] == [4, 9]
    assert logger.steps["gns/optimizer_0/batch_size"][:2] == [4, 9]
