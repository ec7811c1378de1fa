"""What a measurement refuses in words, and what it takes as Trainers do."""

from __future__ import annotations

import math

import lightning as L
import numpy as np
import pytest
import torch
from helpers.adaptive_runs import Model, batches_in_order
from helpers.branches import DOUBLE, Falls, Watched, measure, noise
from helpers.frozen_digits import QUIET, digits
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import AdaptiveBatchSizeCallback


@pytest.fixture(autouse=True)
def _count_anew():
    Watched.training_steps = 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"sizes": (16,)}, "`batch_sizes` must hold 2 different sizes"),
            ({"sizes": (16, 32), "method": "target_loss", "target_loss": 1.0}, "must hold 3 different sizes"),
            ({"sizes": (16, 0)}, "`batch_sizes` must be whole numbers from 1 on"),
            ({"sizes": (16, 24)}, "`batch_sizes` must be multiples of 16, the micro-batch of 16 times 1 rank, got 24"),
            ({"num_examples": 60}, "`num_examples` must be the largest batch size, 64, or more, got 60"),
            ({"method": "guess"}, "`method` must be one of"),
            ({"target_loss": 1.0}, "`target_loss` goes with `method='target_loss'`"),
            ({"method": "target_loss"}, "`target_loss` goes with `method='target_loss'`"),
            ({"tolerance": 0.0}, "`tolerance` must be a positive number"),
            ({"learning_rate": "sgd"}, "`learning_rate` must be one of"),
            ({"tune_learning_rate": 1.0}, "`tune_learning_rate` must be a ratio above 1"),
            ({"confidence": 1.0}, "`confidence` must lie between 0 and 1"),
            ({"seeds": ()}, "`seeds` must hold one number or more"),
            ({"monitor": ""}, "`monitor` must be the name"),
            ({"max_micro_batch": 8}, "`max_micro_batch` is for `data` that is a function"),
            ({"max_micro_batch": 0}, "`max_micro_batch` must be a positive number"),
            ({"seeds": (0, 0)}, "`seeds` must differ"),
            ({"seeds": (-1,)}, "`seeds` must be whole numbers from 0"),
            ({"seeds": (0.5,)}, "`seeds` must be whole numbers from 0"),
            ({"num_examples": math.inf}, "`num_examples` must be the largest batch size, 64, or more, got inf"),
            ({"method": "target_loss", "target_loss": math.nan}, "`target_loss` must be a number, got nan"),
            ({"base_batch_size": 0}, "`base_batch_size` must be a positive number"),
            ({"trainer_kwargs": {"max_epochs": 3}}, r"`trainer_kwargs` must leave out \['max_epochs'\]"),
            ({"trainer_kwargs": {"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"}}, "spawned or forked"),
            ({"model": nn.Linear(1, 1)}, "`model` must be a `lightning.pytorch.LightningModule` or a function"),
            ({"monitor": "accuracy", "val_dataloaders": noise(10)}, "`monitor='accuracy'` needs validation"),
            (
                {"model": Falls(), "monitor": "accuracy", "val_dataloaders": noise(1000)},
                "`monitor='accuracy'` was not logged in validation; what was: .'height'.",
            ),
        ],
    )
    def test_is_refused_in_words(self, tmp_path, arguments, match):
        with pytest.raises(ValueError, match=match):
            measure(tmp_path, **{"model": Watched()} | arguments)
        assert Watched.training_steps == 0

    @pytest.mark.parametrize(
        "callback",
        [
            ModelCheckpoint(),
            TQDMProgressBar(),
            EarlyStopping("loss"),
            LearningRateFinder(),
            GradientAccumulationScheduler({0: 2}),
            AdaptiveBatchSizeCallback(schedule={0: 2}, learning_rate="sqrt"),
        ],
        ids=lambda callback: type(callback).__name__,
    )
    def test_callbacks_out_of_place(self, tmp_path, callback):
        class Brings(Watched):
            def configure_callbacks(self):
                return [callback]

        name = type(callback).__name__
        settings = DOUBLE["trainer_kwargs"] | {"callbacks": [callback]}
        with pytest.raises(ValueError, match=rf"`trainer_kwargs.'callbacks'.` must leave out {name}"):
            measure(tmp_path, Watched(), trainer_kwargs=settings)
        with pytest.raises(ValueError, match=f"`configure_callbacks` of Brings must leave out {name}"):
            measure(tmp_path, Brings())
        assert Watched.training_steps == 0

    def test_data_that_does_not_do_as_it_is_told(self, tmp_path):
        """The learning rate would be that of another batch size than is trained with."""
        with pytest.raises(ValueError, match="`data` was called with 16, and its first batch holds 32 examples"):
            measure(tmp_path / "larger", data=lambda size: batches_in_order(160, 32))
        with pytest.raises(ValueError, match="`data` was called with 32, and its first batch holds 16 examples"):
            measure(tmp_path / "smaller", data=lambda size: batches_in_order(160))
        measure(tmp_path / "few", data=lambda size: batches_in_order(48, size), num_examples=64)

    def test_a_scheduler_that_leaves_steps_out(self, tmp_path):
        class Seldom(Model):
            def configure_optimizers(self):
                optimizers, (config,) = super().configure_optimizers()
                return optimizers, [config | {"frequency": 2}]

        with pytest.raises(ValueError, match="must have `frequency` 1 in `configure_optimizers`, got 2"):
            measure(tmp_path, Seldom("momentum", "exponential"))

    def test_a_batch_larger_than_the_data(self, tmp_path):
        data = digits(160, torch.float64)
        with pytest.raises(ValueError, match="gave no batch for the branch batch_256_rate_1_seed_0"):
            measure(tmp_path, None, lambda size: DataLoader(data, size, drop_last=True), (16, 256))

    def test_a_loss_that_is_not_returned(self, tmp_path):
        class Silent(Model):
            def training_step(self, batch, batch_idx):
                return None

        with pytest.raises(ValueError, match="has no loss; let `training_step` return it"):
            measure(tmp_path, Silent())

    def test_a_trainer_that_ends_before(self, tmp_path):
        settings = DOUBLE["trainer_kwargs"] | {"max_steps": 7}
        with pytest.raises(ValueError, match="ended after 112 of 320 examples"):
            measure(tmp_path, trainer_kwargs=settings)

    def test_data_that_comes_to_an_end(self, tmp_path):
        """A generator gives nothing in its second epoch."""
        data = list(batches_in_order(160))
        with pytest.raises(ValueError, match=r"ended after 160 of 320 examples; .*data that is used up"):
            measure(tmp_path, data=lambda size: (batch for batch in data), sizes=(16, 32))

    def test_functions_among_the_hyper_parameters(self, tmp_path):
        """They are printed with their address, which is another one in every process."""

        class WithFunction(Model):
            def __init__(self, function):
                super().__init__()
                self.save_hyperparameters()

        def made():
            def function():
                pass

            return function

        first = measure(tmp_path, WithFunction(made()))
        assert measure(tmp_path, WithFunction(made())) == first

    def test_manual_optimization(self, tmp_path):
        model = Model()
        model.automatic_optimization = False
        with pytest.raises(ValueError, match="must leave the optimization to the Trainer"):
            measure(tmp_path, model)


class TestTakesWhatTrainersTake:
    def test_numbers_of_numpy(self, tmp_path):
        plain = measure(tmp_path / "plain", seeds=(0, 1), base_batch_size=16)
        found = measure(tmp_path / "numpy", sizes=np.array([16, 32, 64]), seeds=np.arange(2),
                        num_examples=np.int64(320), base_batch_size=np.int64(16))  # fmt: skip
        assert found == plain

    def test_several_loaders(self, tmp_path):
        class Both(Model):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

        class Data(L.LightningDataModule):
            def setup(self, stage):
                self.ranks = self.trainer.world_size

            def train_dataloader(self):
                return {name: batches_in_order(160) for name in "ab"[self.ranks - 1 :]} | {"a": batches_in_order(160)}

        loaders = {name: batches_in_order(160) for name in "ab"}
        batch_size_fn = {"batch_size_fn": lambda batch: len(batch["a"][0])}
        given = measure(tmp_path / "given", Both(), loaders, **batch_size_fn)
        assert measure(tmp_path / "module", Both(), Data(), **batch_size_fn) == given
        assert [row.steps for row in given.batch_sizes] == [20, 10, 6]

    def test_models_that_use_their_logger(self, tmp_path):
        class Draws(Model):
            def training_step(self, batch, batch_idx):
                self.logger.experiment.add_scalar("step", self.global_step)
                return super().training_step(batch, batch_idx)

        settings = DOUBLE["trainer_kwargs"] | {"callbacks": LearningRateMonitor()}
        assert measure(tmp_path / "a", Draws(), trainer_kwargs=settings) == measure(tmp_path / "b")
        assert {path.name for path in (tmp_path / "a").iterdir()} == {"branches", "settings.json", "results.csv"}

    def test_lazy_layers(self, tmp_path):
        class Lazy(Model):
            def __init__(self):
                super().__init__()
                self.net = nn.LazyLinear(10, dtype=torch.float64)

            def setup(self, stage):
                self.net(torch.zeros(1, 64, dtype=torch.float64))

        assert math.isfinite(measure(tmp_path, Lazy()).batch_sizes[0].loss)

    def test_no_warnings_of_what_is_meant(self, tmp_path, recwarn):
        trainer = L.Trainer(max_epochs=1, precision="64-true", callbacks=[EarlyStopping("loss", strict=False)], **QUIET)
        trainer.fit(Model(), batches_in_order(160))
        trainer.save_checkpoint(tmp_path / "epoch.ckpt")

        class Validates(Model):
            def validation_step(self, batch, batch_idx):
                pass

        recwarn.clear()
        measure(tmp_path / "branches", Validates(), ckpt_path=tmp_path / "epoch.ckpt")
        texts = [str(warning.message) for warning in recwarn]
        assert not [text for text in texts if "val_dataloader" in text or "ckpt_path" in text or "interval" in text]
