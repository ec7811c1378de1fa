"""Finished branches are kept on disk, and never trained again."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.adaptive_runs import Model, batches_in_order
from helpers.branches import DOUBLE, Falls, Watched, curves, measure, noise
from helpers.frozen_digits import DigitsMLP, digits
from torch.utils.data import DataLoader

from lightning_wn.critical_batch_size.branch import BranchPlan


@pytest.fixture(autouse=True)
def _count_anew():
    Watched.training_steps = 0


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
