"""measure_critical_batch_size: what it concludes of branches that are known beforehand, and its result."""

from __future__ import annotations

import csv
import json
import math

import lightning as L
import pytest
import torch
from helpers.branches import DOUBLE, Falls, curves, measure, noise
from helpers.frozen_digits import QUIET, DigitsMLP, digits
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.critical_batch_size.branch import Branch, BranchPlan
from lightning_wn.critical_batch_size.conclusion import conclude
from lightning_wn.critical_batch_size.experiment import Sweep, Target
from lightning_wn.critical_batch_size.loss_curve import LossCurve


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
        sweep = Sweep(batch_sizes=(8, 16, 32), num_examples=3200, learning_rate="none")
        found = conclude(branches, sweep, Target(method="target_loss", loss=1.19))
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
