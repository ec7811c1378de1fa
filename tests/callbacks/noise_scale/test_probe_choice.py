"""Which probe reads a run: at first, once it is wrapped, where accumulation changes, and after a checkpoint."""

from __future__ import annotations

import math
import warnings

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.callbacks.noise_scale.optimizer_measurement import ParameterChoice
from lightning_wn.callbacks.noise_scale.probe_choice import ProbeChoice
from lightning_wn.callbacks.worker_results import WorkerResults


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


class Few(L.LightningModule):
    """A model without data: what the choice goes by."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), *layers)


def choice(wish="auto", *, probe="auto", half_life_steps=None, every_n_steps=None, model=None, **of_parameters):
    """A choice, its measurements of one optimizer, and an unfitted Trainer that accumulates as it is told."""
    measurements = Measurements(
        ParameterChoice(**of_parameters), WorkerResults(), probe=probe, every_n_steps=every_n_steps
    )
    model = model or Few()
    measurements.attach([torch.optim.SGD(model.parameters(), lr=0.1)], model)
    return ProbeChoice(wish, measurements, half_life_steps=half_life_steps), measurements, model


def trainer_with(accumulate):
    return L.Trainer(**QUIET, accumulate_grad_batches=accumulate)


def add_measurement(measurements):
    measurements[0].metric.update(torch.tensor([3.0, 3.0]), [32, 32], torch.tensor(2.0))
    measurements.synchronize(across_ranks=False)
    assert measurements[0].metric.num_measurements > 0


class TestTheChoiceItself:
    @pytest.mark.parametrize(
        ("accumulate", "layers", "name"),
        [(2, (), "micro_batch"), (1, (), "per_example"), (1, (nn.BatchNorm1d(3),), "batch_pair")],
    )
    def test_at_first(self, accumulate, layers, name):
        own, measurements, model = choice(model=Few(*layers))
        own.choose(trainer_with(accumulate), model, wrapped=False)
        assert measurements.probe == measurements[0].probe.name == name

    def test_the_first_factor_of_a_schedule_counts(self):
        own, measurements, model = choice()
        trainer = L.Trainer(**QUIET, callbacks=[GradientAccumulationScheduler({0: 4, 3: 1})])
        own.choose(trainer, model, wrapped=False)
        assert measurements.probe == "micro_batch"

    def test_layers_that_came_with_the_wrapping(self):
        own, measurements, model = choice()
        trainer = trainer_with(1)
        own.choose(trainer, model, wrapped=False)
        model.net.append(nn.BatchNorm1d(3))
        own.choose(trainer, model, wrapped=True)
        assert measurements[0].probe.name == "batch_pair"

    def test_a_probe_that_stays_is_the_same_object(self):
        own, measurements, model = choice()
        for wrapped in (False, True):
            own.choose(trainer_with(2), model, wrapped=wrapped)
            measurements[0].probe.seen = getattr(measurements[0].probe, "seen", 0) + 1
        assert measurements[0].probe.seen == 2

    def test_refusals(self):
        own, _, model = choice("micro_batch")
        with pytest.raises(ValueError, match="has one batch size only"):
            own.choose(trainer_with(1), model, wrapped=False)
        sparse = Few(nn.Embedding(3, 3, sparse=True))
        own, _, _ = choice("micro_batch", model=sparse)
        with pytest.raises(ValueError, match="cannot read sparse gradients"):
            own.choose(trainer_with(2), sparse, wrapped=False)
        own, measurements, _ = choice(model=sparse)
        with pytest.warns(
            UserWarning, match="measures nothing in this run, which goes on without it: .*sparse gradients"
        ):
            own.choose(trainer_with(2), sparse, wrapped=False)
        assert "cannot read sparse gradients" in measurements.why_off

    def test_a_change_in_mid_run_where_a_window_starts(self):
        own, measurements, model = choice()
        trainer = trainer_with(1)
        own.choose(trainer, model, wrapped=False)
        own.start()
        assert (measurements.probe, measurements[0].every_n_steps) == ("per_example", 100)
        trainer.accumulate_grad_batches = 4
        own.start_batch(trainer, model, 2)
        assert measurements.probe == "per_example"
        own.start_batch(trainer, model, 4)
        assert measurements.probe == measurements[0].probe.name == "micro_batch"
        assert measurements[0].every_n_steps == 10
        assert not measurements[0].probe.strict

    @pytest.mark.parametrize("layers", [(), (nn.BatchNorm1d(3),)])
    def test_what_is_kept_where_both_are_exact(self, layers):
        """From one micro-batch a step to two: `per_example` and `batch_pair` are as exact."""
        own, measurements, model = choice(model=Few(*layers))
        trainer = trainer_with(1)
        own.choose(trainer, model, wrapped=False)
        own.start()
        add_measurement(measurements)
        trainer.accumulate_grad_batches = 2
        own.start_batch(trainer, model, 0)
        assert measurements[0].metric.num_measurements == 1

    @pytest.mark.parametrize(
        ("before", "given", "cadence", "kept"),
        [
            ("micro_batch", None, 7, 1),
            ("micro_batch", 3, 3, 1),
            ("per_example", None, 10, 1),
            ("batch_pair", None, 10, 1),
            ("consecutive", None, 10, 0),
        ],
    )
    def test_going_on_from_a_checkpoint(self, before, given, cadence, kept):
        own, measurements, model = choice(every_n_steps=given)
        trainer = trainer_with(2)
        own.choose(trainer, model, wrapped=False)
        add_measurement(measurements)
        own.resume_from(before, 7)
        own.start()
        # what settles it is the factor at the first batch
        assert measurements[0].every_n_steps == (given or 10)
        own.start_batch(trainer, model, 5)
        assert measurements[0].every_n_steps == cadence
        assert measurements[0].metric.num_measurements == kept

    def test_the_factor_of_a_resumed_run_is_known_at_its_first_batch(self):
        own, measurements, model = choice()
        trainer = trainer_with(1)
        own.choose(trainer, model, wrapped=False)
        own.resume_from("micro_batch", 7)
        own.start()
        trainer.accumulate_grad_batches = 2
        own.start_batch(trainer, model, 5)
        assert (measurements.probe, measurements[0].every_n_steps) == ("micro_batch", 7)

    def test_half_life(self):
        """Measured every 3 steps with a half-life of 6: two measurements halve the weight."""
        own, measurements, _ = choice(half_life_steps=6, every_n_steps=3)
        own.start()
        assert measurements[0].metric.ema_decay == pytest.approx(0.5**0.5)
        own, measurements, _ = choice(half_life_steps=math.inf, every_n_steps=3)
        own.start()
        assert measurements[0].metric.ema_decay == 1.0

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.01), (torch.bfloat16, 0.05)])
    def test_tolerance_of_checksums(self, dtype, tolerance):
        own, measurements, _ = choice(model=Few().to(dtype))
        own.start()
        assert measurements[0].metric.checksum_tolerance == tolerance

    def test_an_approximate_probe_is_said_and_an_exact_one_is_not(self):
        own, _, _ = choice("consecutive", probe="consecutive")
        with pytest.warns(UserWarning, match="measures with the probe 'consecutive', which is approximate: "):
            own.start()
        own, _, _ = choice()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            own.start()


def test_an_approximate_estimate_does_not_become_exact_by_resuming(tmp_path):
    """The two are never averaged."""
    path = tmp_path / "run.ckpt"
    fit(callback("consecutive"), max_epochs=1, save_to=path)
    checkpoint = torch.load(path, weights_only=True)
    # as a run that fell back to the approximate probe would have written it
    states = checkpoint["callbacks"]
    (old,) = (key for key in states if key.startswith("GradientNoiseScaleCallback"))
    states[callback().state_key] = states.pop(old)
    torch.save(checkpoint, path)
    resumed = fit(callback(), max_epochs=2, accumulate_grad_batches=2, ckpt_path=path)
    assert not resumed.approximate
    assert resumed.num_measurements == 4  # of the second epoch alone


@pytest.mark.parametrize("saved", ["by the Trainer", "by ModelCheckpoint"])
@pytest.mark.parametrize(("schedule", "last"), [({0: 1, 1: 2}, 4), ({0: 2, 1: 1}, 7)])
def test_resuming_after_accumulation_has_changed(tmp_path, schedule, last, saved):
    """The probe is that of the epoch that goes on, not of epoch zero.

    An epoch has eight batches: four windows of two, or seven pairs of neighbours.
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
    assert (first.num_measurements, resumed.num_measurements) == (11, 11 + last)


def test_a_cadence_is_kept_with_its_probe_only(tmp_path):
    """One in 100 is chosen for `per_example`; `micro_batch` has a number of its own."""
    path = tmp_path / "run.ckpt"
    own = GradientNoiseScaleCallback()
    fit(own, max_epochs=1, save_to=path)
    assert own.state_dict()["every_n_steps"] == 100
    own = GradientNoiseScaleCallback()
    fit(own, max_epochs=2, accumulate_grad_batches=2, ckpt_path=path)
    assert own.state_dict()["every_n_steps"] == 10


def test_training_does_not_stop_where_single_micro_batches_cannot_be_measured():
    """A schedule that ends with one micro-batch a step, and a model that has no per-example gradients."""

    class Bare(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            return (self.scale * super().training_step(batch, batch_idx)).exp()

    schedule = GradientAccumulationScheduler({0: 2, 1: 1})
    with pytest.warns(UserWarning, match="cannot measure with the probe 'per_example', and '.*' takes over: "):
        fit(callback(), Bare(), max_epochs=2, callbacks=[schedule])
    with pytest.raises(ValueError, match="`probe='per_example'`"):
        fit(callback("per_example"), Bare(), max_epochs=1)


def test_cadence_comes_from_the_checkpoint_unless_given(tmp_path):
    path = tmp_path / "run.ckpt"
    first = GradientNoiseScaleCallback(every_n_steps=4)
    fit(first, max_steps=12, accumulate_grad_batches=2, save_to=path)
    for given, expected in ((None, 4), (2, 2)):
        own = GradientNoiseScaleCallback(every_n_steps=given)
        fit(own, max_steps=20, accumulate_grad_batches=2, ckpt_path=path)
        assert own._measurements[0].every_n_steps == expected


@pytest.mark.parametrize(("accumulate", "norm", "probe"), [(1, (), "per_example"), (2, (), "micro_batch"),
                                                           (1, (nn.LazyBatchNorm1d,), "batch_pair")])  # fmt: skip
def test_lazy_layers_are_measured_once_they_have_weights(accumulate, norm, probe):
    class Lazy(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(8), *(layer() for layer in norm), nn.Tanh(), nn.LazyLinear(10))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*GradientNoiseScaleCallback.*")
        estimate = fit(callback(), Lazy(), max_epochs=1, accumulate_grad_batches=accumulate)
    assert estimate.probe == probe
    # the first step finds no weights to measure, and the last batch has no next one
    assert estimate.num_measurements == 8 // accumulate - 1 - (probe == "batch_pair")
