"""measure_critical_batch_size: branches against the same training by hand, checkpoints, what is left untouched."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import random
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
from helpers.adaptive_runs import OPTIMIZERS, SCHEDULERS, Model, batches_in_order
from helpers.frozen_digits import QUIET, DigitsMLP, digits
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

from lightning_wn import AdaptiveBatchSizeCallback, GradientNoiseScaleCallback, measure_critical_batch_size
from lightning_wn.critical_batch_size.branch import Branch, BranchPlan
from lightning_wn.critical_batch_size.conclusion import conclude
from lightning_wn.critical_batch_size.isolation import copy_without_trainer
from lightning_wn.critical_batch_size.loss_curve import LossCurve

QUICK = {"progress_bar": False, "trainer_kwargs": {"accelerator": "cpu"}}
DOUBLE = {"progress_bar": False, "trainer_kwargs": {"accelerator": "cpu", "precision": "64-true"}}


class Watched(Model):
    """Counts training steps over all copies."""

    training_steps = 0

    def training_step(self, batch, batch_idx):
        Watched.training_steps += 1
        return super().training_step(batch, batch_idx)


@pytest.fixture(autouse=True)
def _count_anew():
    Watched.training_steps = 0


def measure(directory, model=None, data=None, sizes=(16, 32, 64), **arguments):
    arguments = DOUBLE | {"num_examples": 320, "directory": directory} | arguments
    model = Model() if model is None else model  # a compiled one has no truth value
    return measure_critical_batch_size(model, data or batches_in_order(160), sizes, **arguments)


def curves(directory):
    """From batch size and learning-rate factor to the branch."""
    files = [json.loads(path.read_text()) for path in sorted((directory / "branches").glob("*.json"))]
    branches = [Branch.from_dict(values) for values in files]
    return {(branch.plan.batch_size, branch.plan.learning_rate_factor): branch for branch in branches}


def curves_by_seed(directory, size):
    """From the seed to the branch of a batch size."""
    files = [json.loads(path.read_text()) for path in (directory / "branches").glob(f"batch_{size}_*.json")]
    return {branch.plan.seed: branch for branch in map(Branch.from_dict, files)}


def losses_by_hand(model, micro_batches, windows, rate, *, scheduler_steps=1):
    """Mean losses of windows before their update, with the learning rate times ``rate`` within the step."""
    optimizer = OPTIMIZERS[model.optimizer](model.parameters())
    scheduler = SCHEDULERS[model.scheduler](optimizer) if model.scheduler else None
    batches = iter(micro_batches)
    found = []
    for length in windows:
        optimizer.zero_grad()
        losses = [nn.functional.cross_entropy(model(x), y) for x, y in (next(batches) for _ in range(length))]
        mean = torch.stack(losses).mean()
        mean.backward()
        own = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = own * rate
        optimizer.step()
        optimizer.param_groups[0]["lr"] = own
        for _ in range(scheduler_steps if scheduler else 0):
            scheduler.step()
        found.append(float(mean.detach()))
    return found


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
            expected = losses_by_hand(model, epochs, windows, math.sqrt(size / 16), scheduler_steps=size // 16)
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


class TestNothingElseChanges:
    def test_model_data_random_states_and_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PL_GLOBAL_SEED", "77")
        monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
        model = Model().eval()
        generator = torch.Generator().manual_seed(5)
        data = DataLoader(digits(160, torch.float64), 16, shuffle=True, generator=generator)
        weights, state = copy.deepcopy(model.state_dict()), generator.get_state()
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        measure(tmp_path, model, data)
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not model.training
        assert model._trainer is None
        assert torch.equal(generator.get_state(), state)
        assert random.getstate() == states[0]
        assert (np.random.get_state()[1] == states[1]).all()
        assert torch.equal(torch.get_rng_state(), states[2])
        assert os.environ["PL_GLOBAL_SEED"] == "77"
        assert "PL_SEED_WORKERS" not in os.environ

    def test_random_state_after_an_error(self, tmp_path):
        class Fails(Model):
            def training_step(self, batch, batch_idx):
                raise RuntimeError("broken")

        torch.manual_seed(3)
        before = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="broken"):
            measure(tmp_path, Fails())
        assert torch.equal(torch.get_rng_state(), before)
        assert not (tmp_path / "branches").exists()

    def test_a_model_and_a_module_that_belong_to_a_trainer(self, tmp_path):
        class Data(L.LightningDataModule):
            setups = 0

            def setup(self, stage):
                self.setups += 1

            def train_dataloader(self):
                return batches_in_order(160)

        model, data = Model(), Data()
        trainer = L.Trainer(max_epochs=1, precision="64-true", **QUIET)
        trainer.fit(model, datamodule=data)
        weights, step = copy.deepcopy(model.state_dict()), trainer.global_step
        measure(tmp_path, model, data)
        assert (model.trainer, data.trainer, data.setups, trainer.global_step) == (trainer, trainer, 1, step)
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, datamodule=data)
        assert trainer.global_step == 2 * step


class TestCopies:
    def test_a_loader_shares_its_data_set_and_has_a_sampler_of_its_own(self):
        loader = DataLoader(digits(160), 16, shuffle=True, generator=torch.Generator())
        copied = copy_without_trainer(loader)
        assert copied.dataset is loader.dataset
        assert copied.sampler.data_source is loader.dataset
        assert copied.generator is not loader.generator

    def test_workers_that_persist(self, tmp_path):
        loader = DataLoader(digits(160, torch.float64), 16, num_workers=1, persistent_workers=True)
        next(iter(loader))
        assert copy_without_trainer(loader)._iterator is None

    def test_what_was_compiled_belongs_to_the_original(self, tmp_path):
        plain, model = Model(), Model()
        compiled = torch.compile(model, backend="eager")
        measure(tmp_path / "plain", plain)
        measure(tmp_path / "wrapped", compiled)
        state = copy.deepcopy(model.state_dict())
        L.Trainer(max_epochs=1, precision="64-true", **QUIET).fit(compiled, batches_in_order(160))
        model.load_state_dict(state)
        measure(tmp_path / "fitted", model)  # its `training_step` is now a compiled one
        expected = curves(tmp_path / "plain")
        assert curves(tmp_path / "wrapped") == curves(tmp_path / "fitted") == expected
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())

    def test_what_cannot_be_copied(self, tmp_path):
        class Keeps(Model):
            def training_step(self, batch, batch_idx):
                self.last = super().training_step(batch, batch_idx)
                return self.last

        model = Keeps()
        L.Trainer(max_epochs=1, precision="64-true", **QUIET).fit(model, batches_in_order(160))
        with pytest.raises(ValueError, match=r"`model` cannot be copied for each branch, got Keeps.*Pass a function"):
            measure(tmp_path, model)
        with pytest.raises(ValueError, match="`data` cannot be copied for each branch, got generator"):
            measure(tmp_path, data=(batch for batch in batches_in_order(160)))

    def test_no_trainer(self):
        class Data(L.LightningDataModule):
            def train_dataloader(self):
                return batches_in_order(160)

        model, data = Model(), Data()
        L.Trainer(max_epochs=1, precision="64-true", **QUIET).fit(model, data)
        assert copy_without_trainer(model)._trainer is None
        assert copy_without_trainer(data).trainer is None
        assert None not in (model._trainer, data.trainer)


def test_no_validation_unless_it_is_monitored(tmp_path):
    class Refuses(Model):
        def validation_step(self, batch, batch_idx):
            raise AssertionError

    measure(tmp_path, Refuses(), val_dataloaders=batches_in_order(32))


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


class TestNeverTwice:
    def test_finished_branches_are_not_trained_again(self, tmp_path):
        first = measure(tmp_path, Watched())
        assert Watched.training_steps == 3 * 20
        again = measure(tmp_path, Watched())
        assert Watched.training_steps == 3 * 20
        assert again == first

    def test_more_batch_sizes_and_seeds(self, tmp_path):
        measure(tmp_path, Watched(), sizes=(16, 32))
        assert Watched.training_steps == 40
        measure(tmp_path, Watched(), sizes=(16, 32, 64), seeds=(0, 1))
        assert Watched.training_steps == 40 + 20 + 60

    def test_interrupted_in_the_middle(self, tmp_path):
        """The branch under way is trained anew, and the result is as if nothing had happened."""

        class Stops(Watched):
            def training_step(self, batch, batch_idx):
                if Watched.training_steps == 33:
                    raise RuntimeError("power cut")
                return super().training_step(batch, batch_idx)

        def shuffled(size):
            return DataLoader(digits(160, torch.float64), size, shuffle=True)

        with pytest.raises(RuntimeError, match="power cut"):
            measure(tmp_path / "cut", Stops(), shuffled)
        assert len(curves(tmp_path / "cut")) == 2
        Stops.training_step = Watched.training_step
        resumed = measure(tmp_path / "cut", Stops(), shuffled)
        Watched.training_steps = 0
        whole = measure(tmp_path / "whole", Stops(), shuffled)
        assert Watched.training_steps == 20 + 10 + 6  # of 64, 64 and 32 examples, twice
        assert resumed == whole

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"num_examples": 640}, "`num_examples` was 320 there and is 640 now"),
            ({"learning_rate": "none"}, "`learning_rate` was 'sqrt' there and is 'none' now"),
            ({"model": DigitsMLP(seed=1).double()}, "`model` was 'Model' there and is 'DigitsMLP' now"),
            ({"base_batch_size": 64}, "`base_batch_size` was 16 there"),
        ],
    )
    def test_another_experiment_is_refused(self, tmp_path, change, named):
        measure(tmp_path)
        with pytest.raises(ValueError, match=named):
            measure(tmp_path, **change)

    def test_other_weights_are_another_experiment(self, tmp_path):
        measure(tmp_path)
        model = Model()
        with torch.no_grad():
            model.net[0].bias += 1e-7
        with pytest.raises(ValueError, match="`weights` was"):
            measure(tmp_path, model)

    def test_arguments_of_the_trainer_that_tell(self, tmp_path):
        settings = DOUBLE["trainer_kwargs"]
        measure(tmp_path)
        measure(tmp_path, trainer_kwargs=settings | {"log_every_n_steps": 5})
        with pytest.raises(
            ValueError, match=r"`trainer_kwargs\['gradient_clip_val'\]` was None there and is '0.1' now"
        ):
            measure(tmp_path, trainer_kwargs=settings | {"gradient_clip_val": 0.1})

    def test_a_smaller_batch_size_says_what_to_do(self, tmp_path):
        measure(tmp_path)
        with pytest.raises(ValueError, match=r"is 8 now .it is the smallest batch size unless you give it"):
            measure(tmp_path, data=batches_in_order(160, 8), sizes=(8, 16, 32))
        data = digits(320, torch.float64)
        measure(tmp_path, data=lambda size: DataLoader(data, size), sizes=(8, 16, 32), base_batch_size=16)

    @pytest.mark.parametrize("name", ["settings.json", "branches/batch_32_rate_1_seed_0.json"])
    @pytest.mark.parametrize("text", ['{"plan', "[]"])
    def test_a_damaged_file_is_named(self, tmp_path, name, text):
        first = measure(tmp_path)
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"`directory` holds a damaged file, '.*{name}'; remove it"):
            measure(tmp_path)
        (tmp_path / name).unlink()
        assert measure(tmp_path) == first

    def test_a_directory_that_cannot_be_written_to(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="`directory` must be a folder that can be written to"):
            measure(tmp_path / "file", Watched())
        assert Watched.training_steps == 0
        monkeypatch.setenv("HOME", str(tmp_path))
        measure("~/here")
        assert (tmp_path / "here" / "results.csv").exists()

    def test_given_up_by_tuning_and_then_needed(self, tmp_path):
        """What is worse than another learning rate is cut short; without tuning it is trained to the target."""
        arguments = {"num_examples": 16000, "learning_rate": "none", "method": "target_loss", "target_loss": 9.0}
        measure(tmp_path, Falls(), noise, (8, 16, 32), tune_learning_rate=2.0, **arguments)
        cut = [branch for branch in curves(tmp_path).values() if branch.given_up]
        assert cut
        assert all(math.isinf(branch.steps_to(9.0)) for branch in cut)
        path = tmp_path / "branches" / "batch_32_rate_1_seed_0.json"
        path.write_text(json.dumps(replace(cut[0], plan=BranchPlan(batch_size=32)).to_dict()))
        found = measure(tmp_path, Falls(), noise, (8, 16, 32), **arguments)
        assert [row.steps for row in found.batch_sizes] == pytest.approx([100] * 3, rel=0.01)


class Falls(L.LightningModule):
    """Its loss is a weight that falls by the learning rate in every step, whatever the batch."""

    def __init__(self, seen=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.log("height", self.weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def noise(size):
    return DataLoader(torch.zeros(10_000, 1), size)


class TestBranches:
    def test_equal_progress_has_no_excess(self, tmp_path):
        """By the linear rule all fall by 0.01 in 8 examples; steps of 128 see it half a step later: 0.08 more."""
        found = measure(tmp_path, Falls(), noise, (8, 32, 128), num_examples=5120, learning_rate="linear")
        late = [0.01 * (size - 8) / 16 for size in (8, 32, 128)]
        assert [row.excess for row in found.batch_sizes] == pytest.approx(late, abs=1e-9)

    def test_excess_of_too_few_steps(self, tmp_path):
        """Without a larger learning rate the weight is 10 - 0.01 S: over the last quarter of 5,120 examples, 7/8."""
        found = measure(tmp_path, Falls(), noise, (8, 32, 128), num_examples=5120, learning_rate="none", tolerance=4.3)
        for row in found.batch_sizes:
            steps = 5120 * 0.875 / row.batch_size - 0.5
            assert row.loss == pytest.approx(10 - 0.01 * steps, abs=1e-9)
            assert row.excess == pytest.approx(row.loss - found.batch_sizes[0].loss, abs=1e-9)
        # excesses 0, 4.2 and 5.25
        assert (found.critical_batch_size, found.lower) == (32, 8)

    def test_interval_is_of_paired_differences(self, tmp_path):
        """The same examples in the same order: what the losses have in common does not widen it."""

        class Rough(Falls):
            def training_step(self, batch, batch_idx):
                return self.weight + batch.mean()

        torch.manual_seed(0)
        data = torch.randn(5120, 1, dtype=torch.float64)
        found = measure(tmp_path, Rough(), lambda size: DataLoader(data, size, shuffle=True), (8, 32, 128),
                        num_examples=5120, learning_rate="linear")  # fmt: skip
        # the noise alone would leave 1/√1280 = 0.028
        assert all(row.excess_error < 1e-6 for row in found.batch_sizes[1:])
        assert found.batch_sizes[1].excess == pytest.approx(0.015, abs=1e-9)

    def test_a_branch_that_diverges(self, tmp_path):
        class Explodes(Falls):
            def training_step(self, batch, batch_idx):
                return self.weight * (1.0 if len(batch) < 100 else math.nan)

        found = measure(tmp_path, Explodes(), noise, (8, 32, 128), num_examples=5120, tolerance=9.0)
        assert (found.critical_batch_size, found.upper) == (32, 128)
        assert found.batch_sizes[-1].excess == math.inf

    def test_the_smallest_diverges(self, tmp_path):
        class Explodes(Falls):
            def training_step(self, batch, batch_idx):
                return self.weight * math.nan

        with pytest.raises(ValueError, match="diverged at the smallest batch size"):
            measure(tmp_path, Explodes(), noise, (8, 32, 128), num_examples=640)

    def test_monitor(self, tmp_path):
        """The weight after the branch, on validation data."""
        found = measure(tmp_path, Falls(), noise, (8, 32, 128), num_examples=5120, learning_rate="none",
                        monitor="height", val_dataloaders=noise(64))  # fmt: skip
        expected = [10 - 0.01 * 5120 / size for size in (8, 32, 128)]
        assert [row.loss for row in found.batch_sizes] == pytest.approx(expected, abs=1e-6)

    def test_tuning_takes_the_largest_rate_that_falls(self, tmp_path):
        class Valley(Falls):
            """At learning rates above 0.05 it climbs."""

            def training_step(self, batch, batch_idx):
                rate = self.trainer.optimizers[0].param_groups[0]["lr"]
                return self.weight * 1.0 + 0.0 * rate

            def configure_optimizers(self):
                return Clipped(self.parameters(), lr=0.01)

        class Clipped(torch.optim.SGD):
            def step(self, closure=None):
                # what the optimizer sees within its step
                loss = super().step(closure)
                rate = self.param_groups[0]["lr"]
                if rate > 0.05:
                    with torch.no_grad():
                        self.param_groups[0]["params"][0] += 2 * rate
                return loss

        found = measure(tmp_path, Valley(), noise, (8, 32), num_examples=640, learning_rate="none",
                        tune_learning_rate=2.0)  # fmt: skip
        assert [row.learning_rate_factor for row in found.batch_sizes] == [4.0, 4.0]
        assert {rate for _, rate in curves(tmp_path)} >= {1.0, 2.0, 4.0, 8.0}


class TestTargetLoss:
    def test_steps_of_a_known_law(self, tmp_path):
        """The weight falls by 0.1/(1 + 40/B) a step: S = 50 (1 + 40/B) to fall by 5."""

        class Law(Falls):
            def training_step(self, batch, batch_idx):
                return self.weight * 1.0

            def on_before_optimizer_step(self, optimizer):
                self.weight.grad.mul_(10.0 / (1.0 + 40.0 / self.size))

            def on_train_batch_start(self, batch, batch_idx):
                self.size = len(batch)

        found = measure(tmp_path, Law(), noise, (8, 16, 32, 64, 128), num_examples=16000, learning_rate="none",
                        method="target_loss", target_loss=5.0)  # fmt: skip
        # the straight weight is bent by less than 0.5 % where it is smoothed over log(steps)
        for row in found.batch_sizes:
            assert row.steps == pytest.approx(50 * (1 + 40 / row.batch_size), rel=0.01)
        assert found.critical_batch_size == pytest.approx(40, rel=0.02)
        assert found.fit.min_steps == pytest.approx(50, rel=0.02)
        # it ended soon after: smoothing looks a fifth ahead, and losses are looked at every 3 %
        assert all(branch.curve.steps[-1] < 1.27 * branch.steps_to(5.0) for branch in curves(tmp_path).values())

    def test_monitor(self, tmp_path):
        found = measure(tmp_path, Falls(), noise, (8, 16, 32), num_examples=16000, learning_rate="none",
                        method="target_loss", target_loss=9.0, monitor="height", val_dataloaders=noise(5000),
                        trainer_kwargs=DOUBLE["trainer_kwargs"] | {"val_check_interval": 10})  # fmt: skip
        # S steps are 10 - 0.01 S; joined over log(steps) between validations
        assert [row.steps for row in found.batch_sizes] == pytest.approx([100] * 3, rel=1e-3)

    def test_short_batches_count_as_what_they_are(self, tmp_path):
        """96 examples in batches of 64 are 64 and 32: 48 on average, which is where these steps belong."""

        class Law(Falls):
            def on_before_optimizer_step(self, optimizer):
                self.weight.grad.mul_(10.0 / (1.0 + 40.0 / self.mean))

            def on_train_batch_start(self, batch, batch_idx):
                self.mean = {64: 48.0, 32: 48.0 if self.trainer.num_training_batches == 2 else 32.0}.get(
                    len(batch), len(batch)
                )

        data = torch.zeros(96, 1)
        found = measure(tmp_path, Law(), lambda size: DataLoader(data, size), (8, 16, 32, 64), num_examples=16000,
                        learning_rate="none", method="target_loss", target_loss=5.0)  # fmt: skip
        assert found.batch_sizes[-1].mean_batch_size == pytest.approx(48, rel=0.01)
        assert found.critical_batch_size == pytest.approx(40, rel=0.02)
        assert any("short batches or windows at batch size 64" in note for note in found.notes)

    def test_tuning_finds_a_rate_that_is_a_fifth_faster(self, tmp_path):
        """A learning rate is given up when it is slower than the best so far, and not before."""
        falls = {0.5: 0.006, 1.0: 0.010, 2.0: 0.0125, 4.0: 0.008}

        class Humped(torch.optim.SGD):
            def step(self, closure=None):
                loss = super().step(closure)
                rate = self.param_groups[0]["lr"]
                with torch.no_grad():
                    self.param_groups[0]["params"][0] += rate - falls[round(rate / 0.01, 6)]
                return loss

        class Tuned(Falls):
            def configure_optimizers(self):
                return Humped(self.parameters(), lr=0.01)

        found = measure(tmp_path, Tuned(), noise, (8, 16, 32), num_examples=16000, learning_rate="none",
                        method="target_loss", target_loss=9.0, tune_learning_rate=2.0)  # fmt: skip
        assert [row.learning_rate_factor for row in found.batch_sizes] == [2.0, 2.0, 2.0]
        assert [row.steps for row in found.batch_sizes] == pytest.approx([80] * 3, rel=0.01)
        # the slower ones were ended early: 4 would take 125 steps
        assert curves(tmp_path)[8, 4.0].given_up < 125

    def test_a_size_that_does_not_get_there(self, tmp_path):
        """At 128 the budget is 40 steps, and 100 are needed."""
        found = measure(tmp_path, Falls(), noise, (8, 16, 32, 128), num_examples=5120, learning_rate="none",
                        method="target_loss", target_loss=9.0)  # fmt: skip
        assert found.batch_sizes[-1].steps == math.inf
        assert found.upper < 8
        assert any("not reached at batch size 128" in note for note in found.notes)

    def test_nothing_gets_there(self, tmp_path):
        with pytest.raises(ValueError, match="three batch sizes that reached the target loss, got 0"):
            measure(tmp_path, Falls(), noise, (8, 16, 32), num_examples=64, method="target_loss", target_loss=1.0)


class TestNoiseScale:
    def test_is_beside_what_was_measured(self, tmp_path):
        """At learning rate 0 the noise scale stands still, and its average is what the callback says."""
        callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0)
        data = digits(320)
        settings = {"accelerator": "cpu", "log_every_n_steps": 5, "callbacks": [callback]}
        found = measure(tmp_path, DigitsMLP(lr=0.0), lambda size: DataLoader(data, size, shuffle=True),
                        (16, 32, 64), trainer_kwargs=settings)  # fmt: skip
        trainer = L.Trainer(max_epochs=1, log_every_n_steps=5, callbacks=[callback], **QUIET)
        L.seed_everything(0, verbose=False)
        trainer.fit(DigitsMLP(lr=0.0), DataLoader(data, 64, shuffle=True))
        assert found.batch_sizes[-1].noise_scale == pytest.approx(callback.estimate().noise_scale, rel=1e-5)
        near = min(found.batch_sizes, key=lambda row: abs(math.log(row.noise_scale / row.batch_size)))
        assert found.predicted == near.noise_scale
        assert "The noise scale predicted" in str(found)

    def test_until_the_target_alone(self):
        """What was measured while smoothing looked ahead does not count."""
        steps = tuple(range(1, 101))
        branches = {}
        for size in (8, 16, 32):
            curve = LossCurve(steps, tuple(float(size * s) for s in steps), tuple(2.0 - 0.01 * s for s in steps))
            along = ((40, 10.0), (80, 10.0), (90, 1e9))
            branches[size] = [Branch(plan=BranchPlan(batch_size=size), curve=curve, noise_scales=along)]
        found = conclude(
            branches, target_loss=1.19, tolerance=0.01, confidence=0.95, unit="examples",
            rate=lambda size: 1.0, edges=(), tuned=False,
        )  # fmt: skip
        assert 80 < found.batch_sizes[0].steps < 82
        assert found.batch_sizes[0].noise_scale == pytest.approx(10.0)

    def test_branches_shorter_than_the_interval_of_logging(self, tmp_path):
        callback = GradientNoiseScaleCallback(every_n_steps=1)
        settings = DOUBLE["trainer_kwargs"] | {"callbacks": (callback,), "log_every_n_steps": 50}
        found = measure(tmp_path, trainer_kwargs=settings)
        assert all(row.noise_scale > 0 for row in found.batch_sizes)

    def test_the_users_callback_is_not_touched(self, tmp_path):
        callback = GradientNoiseScaleCallback(every_n_steps=1)
        settings = DOUBLE["trainer_kwargs"] | {"callbacks": [callback]}
        measure(tmp_path, trainer_kwargs=settings)
        assert callback.estimate().num_measurements == 0


class TestResult:
    def test_table_on_disk(self, tmp_path):
        found = measure(tmp_path)
        with (tmp_path / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["batch_size"]) for row in rows] == [16, 32, 64]
        assert [float(row["loss"]) for row in rows] == [row.loss for row in found.batch_sizes]
        assert [float(row["learning_rate_factor"]) for row in rows] == pytest.approx([1.0, math.sqrt(2.0), 2.0])

    def test_printed(self, tmp_path):
        text = str(measure(tmp_path))
        assert text.startswith("Critical batch size ")
        assert "batch size  learning rate  steps" in text
        assert "Epochs end with short batches or windows at batch size 64" in text

    def test_to_dict_is_json(self, tmp_path):
        assert json.loads(json.dumps(measure(tmp_path).to_dict()))["unit"] == "examples"

    @pytest.mark.parametrize("method", ["branches", "target_loss"])
    def test_plot(self, tmp_path, method):
        pytest.importorskip("matplotlib").use("Agg")
        target = {"target_loss": 9.0} if method == "target_loss" else {}
        found = measure(tmp_path, Falls(), noise, (8, 16, 32), num_examples=5120, learning_rate="none",
                        method=method, tolerance=3.0, **target)  # fmt: skip
        axis = found.plot().axes[0]
        points = axis.get_lines()[0].get_xydata()
        assert points[:, 0].tolist() == [8, 16, 32]
        drawn = [row.excess if method == "branches" else row.steps for row in found.batch_sizes]
        assert points[:, 1].tolist() == pytest.approx(drawn)


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
            ({"confidence": 1.0}, "`confidence` must be between 0 and 1"),
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
