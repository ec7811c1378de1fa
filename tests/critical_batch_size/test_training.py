"""Branches are the same training as by hand, also behind a checkpoint and with other seeds."""

from __future__ import annotations

import json
import math

import lightning as L
import pytest
import torch
from helpers.adaptive_runs import OPTIMIZERS, Model, batches_in_order
from helpers.branches import DOUBLE, Watched, curves, curves_by_seed, losses_by_hand, measure
from helpers.frozen_digits import QUIET, digits
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch import nn
from torch.utils.data import DataLoader


@pytest.fixture(autouse=True)
def _count_anew():
    Watched.training_steps = 0


class TestSameAsByHand:
    @pytest.mark.parametrize("optimizer", ["momentum", "adam"])
    @pytest.mark.parametrize("scheduler", [None, "exponential", "lambda"])
    def test_accumulation_learning_rate_and_scheduler(self, tmp_path, optimizer, scheduler):
        """Two epochs of ten micro-batches of 16; a window of 4 ends short, with 2, at the end of each."""
        measure(tmp_path, Model(optimizer, scheduler))
        epochs = list(batches_in_order(160)) * 2
        for size, windows in ((16, [1] * 20), (32, [2] * 10), (64, [4, 4, 2] * 2)):
            model = Model(optimizer, scheduler)
            model.load_state_dict(Model(optimizer, scheduler).state_dict())
            expected = losses_by_hand(model, epochs, windows, math.sqrt(size / 16))
            # float64 and another order of summing
            assert curves(tmp_path)[size, 1.0].curve.losses == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize(("rule", "rate"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
    def test_data_made_to_order(self, tmp_path, rule, rate):
        """Batches of 64 at once, with the learning rate of batch size 16 times the rule's factor."""
        data = digits(320, torch.float64)
        measure(tmp_path, data=lambda size: DataLoader(data, size), learning_rate=rule)
        expected = losses_by_hand(Model(), DataLoader(data, 64), [1] * 5, rate)
        assert curves(tmp_path)[64, 1.0].curve.losses == pytest.approx(expected, rel=1e-9)

    def test_room_for_16_alone(self, tmp_path):
        data = digits(320, torch.float64)
        measure(tmp_path / "small", data=lambda size: DataLoader(data, size), max_micro_batch=16)
        measure(tmp_path / "large", data=lambda size: DataLoader(data, size))
        small, large = (curves(tmp_path / name)[64, 1.0].curve.losses for name in ("small", "large"))
        assert small == pytest.approx(large, rel=1e-9)

    def test_a_branch_ends_after_its_examples(self, tmp_path):
        rows = measure(tmp_path, data=lambda size: DataLoader(digits(320, torch.float64), size)).batch_sizes
        assert [(row.steps, row.examples) for row in rows] == [(20, 320), (10, 320), (5, 320)]

    def test_a_schedule_over_the_length_of_training(self, tmp_path):
        """A model that asks how long training is gets the length in steps of the base batch size, of 320 examples."""

        class Planned(Model):
            def configure_optimizers(self):
                optimizer = OPTIMIZERS["momentum"](self.parameters())
                total = self.trainer.estimated_stepping_batches
                scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / total)
                return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        data = digits(320, torch.float64)
        measure(tmp_path / "a", Planned(), lambda size: DataLoader(data, size))
        measure(tmp_path / "b", Planned(), lambda size: DataLoader(data, size), num_examples=160,
                trainer_kwargs=DOUBLE["trainer_kwargs"] | {"max_steps": 20})  # fmt: skip
        model = Model()
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        expected = []
        for step, (x, y) in enumerate(DataLoader(data, 64)):
            optimizer.param_groups[0]["lr"] = 0.05 * 2.0 * (1.0 - 4 * step / 20)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))
        assert curves(tmp_path / "a")[64, 1.0].curve.losses == pytest.approx(expected, rel=1e-9)
        assert curves(tmp_path / "b")[64, 1.0].curve.losses == pytest.approx(expected[:3], rel=1e-9)

    def test_scheduler_cannot_be_held_back(self, tmp_path):
        with pytest.raises(ValueError, match="must not go below `base_batch_size`"):
            measure(tmp_path, Model("momentum", "lambda"), base_batch_size=32)


class TestFromACheckpoint:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        """After one epoch of 10 micro-batches."""
        trainer = L.Trainer(max_epochs=1, precision="64-true", **QUIET)
        trainer.fit(Model("adam", "lambda"), batches_in_order(160))
        trainer.save_checkpoint(tmp_path / "epoch.ckpt")
        return tmp_path / "epoch.ckpt"

    def test_goes_on_as_the_run_would(self, tmp_path, checkpoint):
        """At the base batch size a branch is what training does anyway: same optimizer state, scheduler, order."""
        measure(tmp_path / "branches", Model("adam", "lambda"), ckpt_path=checkpoint, num_examples=160)
        epochs = list(batches_in_order(160)) * 2
        expected = losses_by_hand(Model("adam", "lambda"), epochs, [1] * 20, 1.0)[10:]
        assert curves(tmp_path / "branches")[16, 1.0].curve.losses == pytest.approx(expected, rel=1e-9)

    def test_larger_batches_start_from_the_same_point(self, tmp_path, checkpoint):
        before = checkpoint.read_bytes()
        measure(tmp_path / "branches", Model("adam", "lambda"), ckpt_path=checkpoint, num_examples=160)
        found = curves(tmp_path / "branches")
        one, four = found[16, 1.0].curve, found[64, 1.0].curve
        assert one.losses[0] < 0.9 * math.log(10)
        assert len(four.losses) == 3  # the last window is short
        # the first window's loss is taken before any update; the small steps' ones only from the second on
        assert four.losses[0] == pytest.approx(sum(one.losses[:4]) / 4, rel=0.3)
        assert checkpoint.read_bytes() == before

    def test_within_an_epoch_where_no_window_begins(self, tmp_path):
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        trainer = L.Trainer(max_epochs=1, callbacks=[saves], precision="64-true",
                            **QUIET | {"enable_checkpointing": True})  # fmt: skip
        trainer.fit(Model(), batches_in_order(160))
        with pytest.raises(ValueError, match="after 3 batches of an epoch, where no window of 2 micro-batches begins"):
            measure(tmp_path / "branches", ckpt_path=tmp_path / "step=3.ckpt")
        # six divide by 2 and, with data made to order, by anything
        measure(tmp_path / "two", sizes=(16, 32), ckpt_path=tmp_path / "step=6.ckpt", num_examples=64)
        data = digits(160, torch.float64)
        measure(tmp_path / "made", data=lambda size: DataLoader(data, size), ckpt_path=tmp_path / "step=3.ckpt")

    def test_holds_weights_alone(self, tmp_path):
        trainer = L.Trainer(max_epochs=1, precision="64-true", **QUIET)
        trainer.fit(Model(), batches_in_order(160))
        trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
        torch.save(Model().state_dict(), tmp_path / "state.pt")
        for name in ("weights.ckpt", "state.pt"):
            with pytest.raises(ValueError, match="holds no state of a Trainer and its optimizer"):
                measure(tmp_path, ckpt_path=tmp_path / name)

    def test_run_is_meant_to_end_before(self, tmp_path, checkpoint):
        settings = DOUBLE["trainer_kwargs"] | {"max_steps": 10}
        with pytest.raises(ValueError, match=r"`trainer_kwargs.'max_steps'.` must be beyond the 10 steps"):
            measure(tmp_path, Model("adam", "lambda"), ckpt_path=checkpoint, trainer_kwargs=settings)

    def test_window_is_checked_before_training(self, tmp_path):
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        settings = QUIET | {"enable_checkpointing": True, "precision": "64-true", "max_steps": 3}
        L.Trainer(callbacks=[saves], **settings).fit(Model(), batches_in_order(160))
        with pytest.raises(ValueError, match="where no window of 2 micro-batches begins"):
            measure(tmp_path / "branches", Watched(), ckpt_path=tmp_path / "step=3.ckpt")
        assert Watched.training_steps == 0

    def test_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match="`ckpt_path` must be a checkpoint file"):
            measure(tmp_path, ckpt_path=tmp_path / "none.ckpt")


class TestSeeds:
    """The first loss is that of the untrained weights on the first batch."""

    @staticmethod
    def first_losses(directory, model, **arguments):
        data = digits(320, torch.float64)
        measure(
            directory, model, lambda size: DataLoader(data, size, shuffle=True), (16, 32), seeds=(0, 1), **arguments
        )
        branches = [json.loads(path.read_text()) for path in sorted((directory / "branches").iterdir())]
        return {(b["plan"]["batch_size"], b["plan"]["seed"]): b["curve"]["losses"][0] for b in branches}

    def test_of_the_order_of_the_data(self, tmp_path):
        weights = Model()
        found = self.first_losses(tmp_path, weights)
        for seed in (0, 1):
            L.seed_everything(seed, verbose=False)
            x, y = next(iter(DataLoader(digits(320, torch.float64), 32, shuffle=True)))
            expected = float(nn.functional.cross_entropy(weights(x), y))
            assert found[32, seed] == pytest.approx(expected, rel=1e-9)
        assert abs(found[16, 0] - found[16, 1]) > 1e-4

    def test_of_the_weights_where_a_function_makes_them(self, tmp_path):
        class Seeded(Model):
            def __init__(self):
                super().__init__()
                nn.init.normal_(self.net[2].bias)  # DigitsMLP has a seed of its own

        def everything():
            return DataLoader(digits(320, torch.float64), 320)

        measure(tmp_path, Seeded, lambda size: everything(), (320, 640), num_examples=640, seeds=(0, 1))
        branches = curves_by_seed(tmp_path, 320)
        for seed in (0, 1):
            L.seed_everything(seed, verbose=False)
            model = Seeded()
            x, y = next(iter(everything()))
            expected = float(nn.functional.cross_entropy(model(x), y))
            assert branches[seed].curve.losses[0] == pytest.approx(expected, rel=1e-9)
        assert branches[0].curve.losses[0] != pytest.approx(branches[1].curve.losses[0], rel=1e-3)
