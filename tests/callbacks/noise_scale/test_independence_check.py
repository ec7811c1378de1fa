"""Rows that share data: found by two batches, never claimed of ordinary runs, and said by the user."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from helpers.batch_dependent import MixedInLoader, collate_mixed, pairs_by_brute_force, shuffled
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback


class Homemade(DigitsMLP):
    """Mixes under no known name, before the training step gets the batch."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch[0], one_hot(batch[1], 10).float()
        share, order = torch.rand(()), torch.randperm(len(x))
        return share * x + (1 - share) * x[order], share * y + (1 - share) * y[order]

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])


class Crops(DigitsMLP):
    """Four noisy views of each of eight digits."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = (part[:8].repeat_interleave(4, dim=0) for part in batch)
        return x + 0.1 * torch.randn_like(x), y


class CropsByHand(Crops):
    """The same without a Trainer, which would call the hook."""

    def training_step(self, batch, batch_idx):
        return super().training_step(self.on_after_batch_transfer(batch, 0), batch_idx)


def fit(model, steps, seed=0, data=None, ckpt_path=None, save_to=None, **arguments):
    """Every second step is measured, so that no batch is in two pairs."""
    L.seed_everything(seed, verbose=False)
    callback = GradientNoiseScaleCallback(**({"every_n_steps": 2, "ema_decay": 1.0} | arguments))
    trainer = L.Trainer(callbacks=[callback], max_steps=steps, log_every_n_steps=10, **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, data or loader(digits(), seed=seed), ckpt_path=ckpt_path)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return callback, [str(w.message) for w in caught if "GradientNoiseScaleCallback" in str(w.message)]


@pytest.mark.parametrize(("model", "measurements"), [(Homemade, 100), (Crops, 15)])
def test_rows_that_share_data_are_found(model, measurements):
    callback, said = fit(model(lr=0.1), 2 * measurements)
    assert callback.estimate().probe == "batch_pair"
    assert len([line for line in said if "measured nothing" not in line]) == 1
    assert "cannot measure with the probe 'per_example', and 'batch_pair' takes over: " in said[0]
    assert "rows of a batch share data" in said[0]
    assert "`examples_are_independent=False`" in said[0]


def test_what_was_measured_before_the_alarm_is_dropped(tmp_path):
    path = tmp_path / "run.ckpt"
    callback, _ = fit(Crops(lr=0.0), 600, save_to=path)
    mean, _, _ = pairs_by_brute_force(CropsByHand(), lambda seed: loader(digits(), seed=seed), 32, epochs=10)
    estimate = callback.estimate()
    # some 280 pairs of batches of 8 digits; by example, views of one digit count as 32 and it is a third
    assert 200 < estimate.num_measurements < 300
    assert estimate.noise_scale == pytest.approx(float(mean[1] / mean[0]), rel=0.3)
    # a resumed run does not begin anew
    resumed, said = fit(Crops(lr=0.0), 620, ckpt_path=path)
    assert resumed.estimate().probe == "batch_pair"
    assert resumed.estimate().num_measurements > estimate.num_measurements
    assert not said


def test_a_probe_that_was_named_measures_nothing_more():
    callback, said = fit(Crops(lr=0.1), 60, probe="per_example")
    assert "cannot measure with the probe 'per_example', and measures nothing more: " in said[0]
    assert callback.estimate().num_measurements == 0
    # as it advises
    assert fit(Crops(lr=0.1), 60, probe="batch_pair")[0].estimate().num_measurements == 30


@pytest.mark.slow
def test_no_alarm_in_ordinary_runs():
    """Forty seeds: SGD and Adam, small and large batches, dropout, few examples."""
    for seed in range(40):
        model = DigitsMLP(lr=0.1 if seed % 2 else 0.003, optimizer="SGD" if seed % 2 else "Adam", seed=seed)
        if seed % 4 > 1:
            model.net.insert(2, torch.nn.Dropout(0.3))
        data = digits(None if seed % 3 else 300)
        callback, said = fit(model, 80, seed, data=loader(data, (16, 32)[seed % 5 == 0], seed=seed))
        assert callback.estimate().probe == "per_example"
        assert callback.estimate().num_measurements == 40
        assert callback._measurements.check.num_pairs >= 39
        assert not said


def test_training_is_the_same_bit_for_bit():
    states = []
    for callbacks in ([], [GradientNoiseScaleCallback(every_n_steps=1)]):
        L.seed_everything(0, verbose=False)
        model = Homemade(lr=0.1)
        L.Trainer(callbacks=callbacks, max_epochs=1, **QUIET).fit(model, loader(digits(640)))
        states.append(model.state_dict())
    assert callbacks[0]._measurements.check.num_pairs > 8
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


def test_what_the_user_says():
    callback, said = fit(DigitsMLP(), 10, examples_are_independent=False)
    assert callback.estimate().probe == "batch_pair"
    assert not said
    with pytest.raises(ValueError, match=r"`examples_are_independent=False` says .*; use `probe='batch_pair'`"):
        fit(DigitsMLP(), 10, probe="per_example", examples_are_independent=False)
    assert fit(DigitsMLP(), 10, probe="batch_pair", examples_are_independent=False)[0].estimate().num_measurements


def test_a_known_mixer_is_named_at_the_start():
    data = shuffled(digits(), 32, 0, collate_mixed)
    data.collate_fn = mixup_collate
    callback, said = fit(MixedInLoader(), 10, data=data)
    assert callback.estimate().probe == "batch_pair"
    assert len(said) == 1
    assert "'batch_pair' takes over: mixup_collate lets the rows of a batch share data" in said[0]


def mixup_collate(examples):
    return collate_mixed(examples)


def test_tokens_are_not_compared():
    """Those of one example are not independent, and the two traces have other means."""
    callback, _ = fit(
        DigitsMLP(), 20, data=DataLoader(digits(640), 32), batch_size_fn=lambda batch: 1 + batch[1], unit="tokens"
    )
    assert callback.estimate().num_measurements == 10
    assert callback._measurements.check.num_pairs == 0
