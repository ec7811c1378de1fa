"""What a measurement leaves untouched, and what it copies."""

from __future__ import annotations

import copy
import os
import random

import lightning as L
import numpy as np
import pytest
import torch
from helpers.adaptive_runs import Model, batches_in_order
from helpers.branches import curves, measure
from helpers.frozen_digits import QUIET, digits
from torch.utils.data import DataLoader

from lightning_wn.critical_batch_size.isolation import copy_without_trainer


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
