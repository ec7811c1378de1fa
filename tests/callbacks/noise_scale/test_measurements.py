"""The estimates of a run by optimizer and group, and their ways: into checkpoints, and home from worker processes."""

from __future__ import annotations

import copy
import io
import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.callbacks.noise_scale.curvature_measurement import CURVATURE
from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.callbacks.noise_scale.optimizer_measurement import ParameterChoice
from lightning_wn.callbacks.worker_results import WorkerResults
from lightning_wn.noise_scale.samples import GradientSamples, Rejection


class Two(L.LightningModule):
    """One weight for each of two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in (1, 3)])


def measurements(*groups, optimizers=1, worker_results=None, preconditioned=False, **arguments):
    """Of optimizers that move all parameters alike, with plain means."""
    choice = ParameterChoice(groups=dict.fromkeys(groups, "*"), preconditioned=preconditioned)
    arguments = {"metric_settings": {"ema_decay": 1.0}} | arguments
    found = Measurements(choice, worker_results or WorkerResults(), **arguments)
    if optimizers > 1:
        model = Two()
        found.attach([torch.optim.SGD([weight], lr=0.1) for weight in model.weights[:optimizers]], model)
    return found


def add_step(metric, *noise_scales):
    """Add a step of two samples of 32 examples with |G|² = 1 for the total and for each group."""
    traces = torch.tensor(noise_scales, dtype=torch.float64)
    metric.update((1 + traces / 32).expand(2, -1), [32, 32], 1 + traces / 64)


def noise_scales(found):
    return {key: pytest.approx(estimate.noise_scale) for key, estimate in found.estimates().items()}


class TestByOptimizerAndGroup:
    def test_one_optimizer(self):
        found = measurements("head", "body")
        add_step(found[0].metric, 10.0, 20.0, 30.0)
        found.synchronize(across_ranks=False)
        assert noise_scales(found) == {"total": 10.0, "head": 20.0, "body": 30.0}
        assert found.estimate(group="head").noise_scale == pytest.approx(20.0)
        assert found.estimate(0) == found.estimate()
        assert found.names == ("head", "body")
        assert found.start_of_key(0) == ""

    def test_several_optimizers(self):
        found = measurements("head", optimizers=2)
        add_step(found[0].metric, 10.0, 20.0)
        add_step(found[1].metric, 40.0, 50.0)
        found.synchronize(across_ranks=False)
        assert noise_scales(found) == {
            "optimizer_0/total": 10.0,
            "optimizer_0/head": 20.0,
            "optimizer_1/total": 40.0,
            "optimizer_1/head": 50.0,
        }
        assert found.estimate(1, "head").noise_scale == pytest.approx(50.0)
        with pytest.raises(ValueError, match=r"`optimizer` must be named .* give one of \[0, 1\]"):
            found.estimate()

    def test_curvature_has_no_place_in_any_optimizer(self):
        found = measurements("head", curvature_every_n_steps=5)
        add_step(found.curvature.metric, 70.0)
        found.synchronize(across_ranks=False)
        assert found.names == ("head", CURVATURE)
        assert found.estimate(group=CURVATURE).noise_scale == pytest.approx(70.0)
        assert not found.has_measured

    def test_names_that_there_are_not(self):
        with pytest.raises(ValueError, match=r"`group` must be None or one of \['a', 'preconditioned'\], got 'curv"):
            measurements("a", preconditioned=True).estimate(group="curvature")
        for optimizer in (-1, 1):
            with pytest.raises(ValueError, match=rf"`optimizer` must be None or one of \[0\], got {optimizer}"):
                measurements().index_of(optimizer)

    def test_micro_batch_size(self):
        found = measurements()
        assert math.isnan(found.micro_batch_size)
        add_step(found[0].metric, 10.0)
        assert not found.has_measured
        found.synchronize(across_ranks=False)
        assert found.has_measured
        assert (found.estimate().batch_size, found.micro_batch_size) == (64, 32)
        # two ranks of this one's kind: each has two micro-batches of 32
        add_step(found[0].metric, 10.0)
        found[0].metric.fold_pending(2 * found[0].metric.pending)
        assert (found.estimate().batch_size, found.micro_batch_size) == (128, 64)

    def test_optimizers_of_the_run_and_of_a_checkpoint(self):
        found = measurements(optimizers=2)
        assert [p.numel() for own in found for p in own.parameters] == [1, 3]
        found.keep(1)
        assert len(found) == 1
        # as where a Trainer has no optimizer
        found.keep(0)
        assert len(found) == 1

    @pytest.mark.parametrize(("probe", "name", "cadence"), [("auto", "micro_batch", 10), ("per_example",) * 2 + (100,)])
    def test_probe_and_cadence_before_a_run(self, probe, name, cadence):
        found = measurements(probe=probe)
        assert (found.probe, found[0].probe.name, found[0].every_n_steps) == (name, name, cadence)
        assert measurements(probe=probe, every_n_steps=3)[0].every_n_steps == 3

    def test_reset(self):
        found = measurements(curvature_every_n_steps=5)
        for metric in found.metrics:
            add_step(metric, 10.0)
        found.synchronize(across_ranks=False)
        found.reset()
        assert [metric.num_measurements for metric in found.metrics] == [0, 0]


class TestWarnings:
    def irregular(self):
        ones = torch.ones(2, 1, dtype=torch.float64)
        return GradientSamples(
            sq_norms=ones, sizes=[32, 32], weights=[1.0, 1.0], grad_sq_norm=ones[:1, 0], irregular=True
        )

    def test_each_reason_is_said_once_whichever_metric_has_it(self):
        found = measurements(optimizers=2)
        found[1].metric.add_samples(self.irregular())
        with pytest.warns(UserWarning, match="a gradient came in several parts"):
            found.synchronize(across_ranks=False)
        found[0].metric.add_samples(self.irregular())
        add_step(found[0].metric, math.nan)
        with pytest.warns(UserWarning, match="NaN or infinite") as said:
            found.synchronize(across_ranks=False)
        assert len(said) == 1
        assert [own.metric.rejected[Rejection.IRREGULAR] for own in found] == [1, 1]

    def test_a_single_sample_is_nothing_to_act_on(self):
        found = measurements()
        found[0].metric.update(torch.ones(1), [32], torch.tensor(1.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.synchronize(across_ranks=False)
        assert found[0].metric.rejected[Rejection.SINGLE_SAMPLE] == 1


class TestState:
    def saved(self, found):
        """The state as a file brings it back, without arbitrary code."""
        file = io.BytesIO()
        torch.save(found.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def measured(self, *groups, **arguments):
        found = measurements(*groups, optimizers=2, **arguments)
        for index, own in enumerate(found):
            add_step(own.metric, *(10.0 * (1 + index + place) for place in range(1 + len(groups))))
            own.steps = 7 + index
            own.coverage = (0.5,) + (0.25,) * len(groups)
        found.synchronize(across_ranks=False)
        return found

    def test_all_comes_back_where_a_model_is_only_evaluated(self):
        found = self.measured("head", "body", probe="consecutive", every_n_steps=3, curvature_every_n_steps=5)
        add_step(found.curvature.metric, 70.0)
        found.synchronize(across_ranks=False)
        later = measurements("head", "body", curvature_every_n_steps=9)
        later.load_state_dict(self.saved(found), fitting=False)
        assert later.estimates() == found.estimates()
        assert later.estimate(1, "head").coverage == 0.25
        assert later.estimate(0).approximate
        assert [own.every_n_steps for own in later] == [3, 3]
        assert [own.steps for own in later] == [7, 8]

    def test_a_fit_takes_over_what_was_measured_and_finds_out_the_rest(self):
        found = self.measured(probe="per_example", every_n_steps=3)
        later = measurements()
        later.load_state_dict(self.saved(found), fitting=True)
        assert noise_scales(later) == {"optimizer_0/total": 10.0, "optimizer_1/total": 20.0}
        assert (later.probe, later[0].every_n_steps, later.estimate(0).coverage) == ("micro_batch", 10, 1.0)
        assert later[1].steps == 8

    def test_other_groups_than_before(self):
        """The total and groups of the same name go on; others start afresh."""
        later = measurements("new", "body")
        later.load_state_dict(self.saved(self.measured("head", "body")), fitting=False)
        first = {name: later.estimate(0, name) for name in (None, "new", "body")}
        assert [estimate.num_measurements for estimate in first.values()] == [1, 0, 1]
        assert first["body"].noise_scale == pytest.approx(30.0)
        assert [estimate.coverage for estimate in first.values()] == [0.5, 1.0, 0.25]

    def test_curvature_that_only_one_side_measures(self):
        without, beside = measurements(), measurements(curvature_every_n_steps=5)
        beside.load_state_dict(self.saved(without), fitting=True)
        without.load_state_dict(self.saved(beside), fitting=True)
        assert beside.estimate(group=CURVATURE).num_measurements == 0

    def test_a_cadence_from_numpy_is_a_plain_number_in_a_checkpoint(self):
        assert self.saved(measurements(every_n_steps=np.int64(3)))["every_n_steps"] == 3


def in_worker(worker_results):
    """The same shared memory, as a worker process has it."""
    return copy.copy(worker_results)


class TestWorkerProcesses:
    def test_all_comes_home(self):
        parent = measurements("head", curvature_every_n_steps=5)
        worker = measurements(
            "head",
            optimizers=2,
            worker_results=in_worker(parent._worker_results),
            probe="consecutive",
            every_n_steps=4,
            curvature_every_n_steps=5,
        )
        add_step(worker[0].metric, 10.0, 20.0)
        add_step(worker[1].metric, 30.0, 40.0)
        add_step(worker.curvature.metric, 50.0)
        worker.synchronize(across_ranks=False)
        worker[1].coverage = (0.5, 0.25)
        worker.hand_over()
        assert parent.has_measured
        assert parent.estimates() == worker.estimates()
        assert parent.estimate(1, "head").coverage == 0.25
        assert parent.state_dict()["every_n_steps"] == 4
        assert parent[1].probe.name == parent.probe == "consecutive"

    @pytest.mark.parametrize("ask", ["estimate", "estimates", "has_measured", "micro_batch_size", "state_dict"])
    def test_whatever_is_asked_first(self, ask):
        parent = measurements()
        worker = measurements(worker_results=in_worker(parent._worker_results))
        add_step(worker[0].metric, 10.0)
        worker.synchronize(across_ranks=False)
        worker.hand_over()
        answer = getattr(parent, ask)
        _ = answer() if callable(answer) else answer
        assert parent[0].metric.num_measurements == 1

    def test_results_of_an_earlier_run_are_none_of_a_later_one(self):
        shared = WorkerResults()
        worker = measurements(worker_results=in_worker(shared))
        add_step(worker[0].metric, 10.0)
        worker.synchronize(across_ranks=False)
        worker.hand_over()
        assert not measurements(worker_results=shared).has_measured
        parent = measurements(worker_results=shared)
        worker.hand_over()
        parent.reset()
        assert not parent.has_measured

    def test_results_without_room(self):
        groups = [f"group_{index}" for index in range(1000)]
        with pytest.raises(ValueError, match=r"are too large to come home from spawned processes.*`strategy='ddp'`"):
            measurements(*groups).hand_over()


def fit(**settings):
    callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0)
    trainer = L.Trainer(callbacks=[callback], **(QUIET | {"accumulate_grad_batches": 4} | settings))
    trainer.fit(DigitsMLP(), loader(digits()))
    return callback, trainer


def test_result_of_earlier_workers_is_forgotten():
    """A spawned fit whose estimate nobody asked for must not come up in a later fit or after a reset."""

    def leave_result(callback):
        measured, _ = fit(max_steps=7)
        measured._measurements._worker_results = in_worker(callback._worker_results)
        measured._measurements.hand_over()

    callback = GradientNoiseScaleCallback(every_n_steps=1)
    leave_result(callback)
    assert callback.estimate().num_measurements == 7
    settings = QUIET | {"max_steps": 20, "accumulate_grad_batches": 2, "log_every_n_steps": 5}
    callback = GradientNoiseScaleCallback(every_n_steps=1)
    leave_result(callback)
    L.Trainer(callbacks=[callback], **settings).fit(DigitsMLP(), loader(digits()))
    assert callback.estimate().num_measurements == 20
    callback = GradientNoiseScaleCallback()
    leave_result(callback)
    callback.reset()
    assert callback.estimate().num_measurements == 0


def test_advice_from_a_checkpoint_alone(tmp_path):
    """A new process that only validates knows the run that was measured."""
    callback, trainer = fit(max_steps=20)
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    class Model(DigitsMLP):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.training_step(batch, batch_idx))

    later = GradientNoiseScaleCallback()
    validation = DataLoader(digits(64), 32)
    L.Trainer(callbacks=[later], **QUIET).validate(Model(), validation, tmp_path / "run.ckpt", verbose=False)
    assert later.advise().configuration == callback.advise().configuration
    assert later.advise().suggested_batch_size == callback.advise().suggested_batch_size
    assert later.advise().run.every_n_steps == 1


def test_an_estimate_read_from_a_checkpoint_says_what_it_is(tmp_path):
    """A fresh callback that only evaluates the model has the estimate of the run that trained it."""

    class Normalized(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(32))

        def test_step(self, batch, batch_idx):
            pass

    path = tmp_path / "run.ckpt"
    trained, fresh = (
        GradientNoiseScaleCallback(
            "consecutive", every_n_steps=1, ema_decay=1.0, layers="net.0", groups={"bias": "*.bias"}
        )
        for _ in range(2)
    )
    trainer = L.Trainer(callbacks=[trained], **QUIET, max_epochs=1)
    trainer.fit(Normalized(), DataLoader(digits(128), 16))
    trainer.save_checkpoint(path)
    assert trained.estimate().approximate
    assert trained.estimate().coverage < 1
    L.Trainer(callbacks=[fresh], **QUIET).test(Normalized(), DataLoader(digits(32), 16), ckpt_path=path, verbose=False)
    assert fresh.estimate() == trained.estimate()


def test_state_loads_weights_only(tmp_path):
    """Tensors and primitives alone."""
    path = tmp_path / "run.ckpt"
    _, trainer = fit(max_steps=4)
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"]
