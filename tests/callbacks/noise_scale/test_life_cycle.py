"""What an estimate says of itself after resuming, in another process, and where accumulation changes."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback


def callback(probe="auto", **arguments):
    return GradientNoiseScaleCallback(probe, every_n_steps=1, ema_decay=1.0, **arguments)


def fit(own, model=None, *, ckpt_path=None, save_to=None, callbacks=(), **settings):
    trainer = L.Trainer(callbacks=[own, *callbacks], **(QUIET | settings))
    trainer.fit(model or DigitsMLP(), DataLoader(digits(128), 16), ckpt_path=ckpt_path)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return own.estimate()


def with_batch_norm():
    model = DigitsMLP()
    model.net.insert(1, nn.BatchNorm1d(32))
    return model


def test_an_estimate_read_from_a_checkpoint_says_what_it_is(tmp_path):
    """A fresh callback that only evaluates the model has the estimate of the run that trained it."""
    path = tmp_path / "run.ckpt"
    trained = fit(callback(layers="net.0", groups={"bias": "*.bias"}), with_batch_norm(), max_epochs=1, save_to=path)
    assert trained.approximate
    assert trained.coverage < 1

    class Tested(DigitsMLP):
        def test_step(self, batch, batch_idx):
            pass

    model = Tested()
    model.net.insert(1, nn.BatchNorm1d(32))
    fresh = callback(layers="net.0", groups={"bias": "*.bias"})
    L.Trainer(callbacks=[fresh], **QUIET).test(model, DataLoader(digits(32), 16), ckpt_path=path, verbose=False)
    assert fresh.estimate() == trained


def test_an_approximate_estimate_does_not_become_exact_by_resuming(tmp_path):
    """The two are never averaged."""
    path = tmp_path / "run.ckpt"
    fit(callback(), with_batch_norm(), max_epochs=1, save_to=path)
    resumed = fit(callback(), with_batch_norm(), max_epochs=2, accumulate_grad_batches=2, ckpt_path=path)
    assert not resumed.approximate
    assert resumed.num_measurements == 4  # of the second epoch alone


@pytest.mark.parametrize("saved", ["by the Trainer", "by ModelCheckpoint"])
@pytest.mark.parametrize(("schedule", "count"), [({0: 1, 1: 2}, 8), ({0: 2, 1: 1}, 14)])
def test_resuming_after_accumulation_has_changed(tmp_path, schedule, count, saved):
    """The probe is that of the epoch that goes on, not of epoch zero.

    An epoch has eight batches: four windows of two, or seven pairs of consecutive steps.
    """

    def run(epochs, **settings):
        callbacks = [GradientAccumulationScheduler(schedule), *settings.pop("callbacks", [])]
        return fit(callback(), with_batch_norm(), max_epochs=epochs, callbacks=callbacks, **settings)

    if saved == "by the Trainer":
        path = tmp_path / "run.ckpt"
        first = run(2, save_to=path)
    else:
        path = tmp_path / "last.ckpt"
        first = run(2, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    resumed = run(3, ckpt_path=path)
    assert resumed.probe == first.probe
    assert (first.num_measurements, resumed.num_measurements) == (count // 2, count)


def test_a_cadence_is_kept_with_its_probe_only(tmp_path):
    """One in 100 is chosen for `per_example`; `micro_batch` has a number of its own."""
    path = tmp_path / "run.ckpt"
    own = GradientNoiseScaleCallback()
    fit(own, max_epochs=1, save_to=path)
    assert own.state_dict()["every_n_steps"] == 100
    own = GradientNoiseScaleCallback()
    fit(own, max_epochs=2, accumulate_grad_batches=2, ckpt_path=path)
    assert own.state_dict()["every_n_steps"] == 10


def test_state_loads_weights_only(tmp_path):
    """Tensors and primitives alone."""
    path = tmp_path / "run.ckpt"
    fit(callback(), max_epochs=1, save_to=path)
    assert torch.load(path, weights_only=True)["callbacks"]


def test_training_does_not_stop_where_single_micro_batches_cannot_be_measured():
    """A schedule that ends with one micro-batch a step, and a model that has no per-example gradients."""

    class Bare(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            return self.scale * super().training_step(batch, batch_idx)

    own = callback()
    schedule = GradientAccumulationScheduler({0: 2, 1: 1})
    with pytest.warns(UserWarning, match=r"`probe='per_example'` leaves out steps, and says so once: "):
        estimate = fit(own, Bare(), max_epochs=2, callbacks=[schedule])
    assert estimate.num_measurements == 4  # of the first epoch
    with pytest.raises(ValueError, match="`probe='per_example'`"):
        fit(callback(), Bare(), max_epochs=1)
