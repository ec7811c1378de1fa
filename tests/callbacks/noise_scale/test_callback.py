"""GradientNoiseScaleCallback on one device: the truth, the life cycle, what it costs, what it logs."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from helpers.frozen_digits import (
    QUIET,
    DigitsMLP,
    digits,
    first_length,
    loader,
    per_example_gradients,
    standard_errors,
    truth,
)
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.batch_size.advice import RunConfiguration
from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.noise_scale.samples import Rejection


def measure(model, data, accumulate=4, steps=400, callbacks=(), trainer_args=None, **callback_args):
    callback_args = {"every_n_steps": 1, "ema_decay": 1.0} | callback_args
    callback = GradientNoiseScaleCallback(**callback_args)
    settings = QUIET | {"max_steps": steps, "accumulate_grad_batches": accumulate} | (trainer_args or {})
    trainer = L.Trainer(callbacks=[callback, *callbacks], **settings)
    trainer.fit(model, data)
    return callback, trainer


def assert_true_within(callback, gradients, windows, errors=3.0):
    estimate = callback.estimate()
    expected = truth(gradients)
    spread = standard_errors(gradients, windows, estimate.num_measurements)
    assert abs(estimate.grad_sq_norm - expected[0]) < errors * spread[0]
    assert abs(estimate.cov_trace - expected[1]) < errors * spread[1]
    return spread[0] / expected[0], spread[1] / expected[1]


class TestTruth:
    """Frozen digits MLP against brute force, within 3 standard errors of the design."""

    def test_accumulation(self):
        model, data = DigitsMLP(), digits()
        callback, _ = measure(model, loader(data))
        assert callback.estimate().num_measurements == 400
        relative = assert_true_within(callback, per_example_gradients(model, data), [[32] * 4] * 14)
        assert max(relative) < 0.05 / 3  # the design resolves 5 %

    @pytest.mark.parametrize("decay", [1.0, 0.99])
    def test_the_callbacks_own_interval_holds_the_truth(self, decay):
        model, data = DigitsMLP(), digits()
        callback, _ = measure(model, loader(data), steps=150, ema_decay=decay, confidence=0.999)
        expected = truth(per_example_gradients(model, data))
        estimate = callback.estimate()
        assert estimate.lower < expected[1] / expected[0] < estimate.upper
        assert estimate.upper < 3 * estimate.lower

    def test_ragged_batches_and_short_windows(self):
        """6 batches an epoch, the last of 16: windows of 4 and of 2."""
        model, data = DigitsMLP(), digits(176)
        callback, _ = measure(model, loader(data, drop_last=False))
        assert callback.estimate().num_measurements == 400
        assert callback.estimate().batch_size == 128
        assert_true_within(callback, per_example_gradients(model, data), [[32] * 4, [32, 16]])

    def test_windows_of_one_are_left_out(self):
        """5 batches an epoch: windows of 4 and of 1."""
        model, data = DigitsMLP(), digits(160)
        callback, _ = measure(model, loader(data))
        assert callback.estimate().num_measurements == 200
        assert callback._measurements[0].metric.rejected[Rejection.SINGLE_SAMPLE] == 200
        assert_true_within(callback, per_example_gradients(model, data), [[32] * 4])

    def test_accumulation_that_changes_between_epochs(self):
        model, data = DigitsMLP(), digits(256)
        scheduler = GradientAccumulationScheduler({0: 1, 2: 2, 60: 4})
        callback, _ = measure(model, loader(data), accumulate=1, steps=400, callbacks=[scheduler])
        # steps of one micro-batch are measured example by example
        assert callback._measurements[0].metric.rejected[Rejection.SINGLE_SAMPLE] == 0
        assert callback.estimate().num_measurements == 400
        assert callback.estimate().probe == "micro_batch"
        # three designs: be content with the widest one's error
        assert_true_within(callback, per_example_gradients(model, data), [[32] * 2] * 4)
        assert callback.advise().configuration.accumulate_grad_batches == 4

    def test_an_exact_estimate_goes_on_from_another_exact_one(self):
        """Two epochs of eight pairs of batches, less the one that the change cuts off, and eight windows of two."""
        model, data = DigitsMLP(), digits(256)
        model.net.insert(1, nn.BatchNorm1d(32))
        scheduler = GradientAccumulationScheduler({0: 1, 2: 2})
        callback, _ = measure(model, loader(data), accumulate=1, steps=24, callbacks=[scheduler])
        estimate = callback.estimate()
        assert (estimate.probe, estimate.approximate, estimate.num_measurements) == ("micro_batch", False, 15 + 8)

    def test_batch_size_of_windows_that_end_with_the_epoch(self):
        """One window an epoch is a full one, for its last batch is not short."""
        scheduler = GradientAccumulationScheduler({0: 4, 2: 8})
        callback, _ = measure(
            DigitsMLP(), loader(digits(256)), 1, steps=-1, callbacks=[scheduler], trainer_args={"max_epochs": 4}
        )
        assert callback.estimate().batch_size == 256
        assert callback.advise().suggested_batch_size % 32 == 0

    def test_batch_size_leaves_out_a_short_last_batch(self):
        """6 batches an epoch, the last of 16: windows of 64, 64 and 48."""
        callback, _ = measure(DigitsMLP(), loader(digits(176), drop_last=False), accumulate=2, steps=6)
        assert callback.estimate().batch_size == 64

    def test_advice_speaks_of_the_step_that_was_measured(self):
        """StochasticWeightAveraging accumulates over a whole last epoch, to no step, for the batch norms."""
        model = DigitsMLP()
        model.net.insert(1, nn.BatchNorm1d(32))
        averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
        settings = {"max_epochs": 3}
        callback, _ = measure(model, loader(digits(256)), steps=-1, callbacks=[averaging], trainer_args=settings)
        assert callback.advise().configuration == RunConfiguration(accumulate_grad_batches=4, num_ranks=1)

    def test_tokens_counted_by_a_function(self):
        """Counting half the examples as the unit halves tr(Σ) and leaves |G|²."""
        model, data = DigitsMLP(), digits()
        examples, _ = measure(model, loader(data), steps=20)
        halves, _ = measure(model, loader(data), steps=20, batch_size_fn=lambda b: len(b[0]) / 2, unit="pairs")
        tensors, _ = measure(model, loader(data), steps=20, batch_size_fn=lambda b: torch.tensor(len(b[0]) / 2))
        assert halves.estimate().cov_trace == pytest.approx(examples.estimate().cov_trace / 2, rel=1e-12)
        assert halves.estimate().grad_sq_norm == pytest.approx(examples.estimate().grad_sq_norm, rel=1e-9)
        assert halves.estimate().unit == "pairs"
        assert tensors.estimate().noise_scale == pytest.approx(halves.estimate().noise_scale, rel=1e-12)

    def test_half_life_is_a_decay_per_measurement(self):
        model, data = DigitsMLP(), digits()
        by_decay, _ = measure(model, loader(data), steps=40, every_n_steps=2, ema_decay=0.5)
        by_life, _ = measure(model, loader(data), steps=40, every_n_steps=2, ema_decay=0.99, half_life_steps=2)
        assert by_life.estimate() == by_decay.estimate()


class TestPrecision:
    @pytest.mark.parametrize("optimizer", ["SGD", "FusedAdam"])
    def test_loss_scaler(self, optimizer):
        """A real fp16 scaler on CPU; a fused optimizer's gradients are still scaled before its step."""
        data = digits()

        class Model(DigitsMLP):
            def configure_optimizers(self):
                if optimizer == "SGD":
                    return torch.optim.SGD(self.parameters(), lr=0.0)
                return torch.optim.Adam(self.parameters(), lr=0.0, fused=True)

        plain, _ = measure(Model(), loader(data), steps=30)
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
        scaled, _ = measure(Model(), loader(data), steps=30, trainer_args={"plugins": [plugin]})
        assert scaled.estimate().num_measurements == 30
        # 11 bits of mantissa in the products
        assert scaled.estimate().grad_sq_norm == pytest.approx(plain.estimate().grad_sq_norm, rel=0.02)
        assert scaled.estimate().cov_trace == pytest.approx(plain.estimate().cov_trace, rel=0.02)

    def test_overflowing_scale_is_left_out_and_recovers(self):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**24))
        with pytest.warns(UserWarning, match="NaN or infinite"):
            callback, _ = measure(DigitsMLP(), loader(digits()), steps=30, trainer_args={"plugins": [plugin]})
        rejected = callback._measurements[0].metric.rejected[Rejection.NON_FINITE]
        assert rejected > 0
        assert callback.estimate().num_measurements == 30 - rejected
        assert math.isfinite(callback.estimate().cov_trace)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_other_precisions(self, precision):
        dtype = torch.float64 if precision == "64-true" else torch.float32
        data = digits(dtype=dtype)
        plain, _ = measure(DigitsMLP(), loader(digits()), steps=30)
        other, _ = measure(DigitsMLP(), loader(data), steps=30, trainer_args={"precision": precision})
        assert other.estimate().num_measurements == 30
        # 8 bits of mantissa in the products, and under bf16-true in the gradients
        assert other.estimate().noise_scale == pytest.approx(plain.estimate().noise_scale, rel=0.1)


class TestTrainingIsUnchanged:
    @pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
    @pytest.mark.parametrize("clip", [None, 0.05])
    def test_bit_for_bit(self, optimizer, clip):
        results = []
        for callbacks in ([], [GradientNoiseScaleCallback(every_n_steps=1)], [GradientNoiseScaleCallback()]):
            model = nn.Sequential()
            model = DigitsMLP(lr=0.05, optimizer=optimizer)
            model.net.append(nn.Dropout(0.2))
            L.seed_everything(3, verbose=False)
            settings = QUIET | {"max_epochs": 2, "accumulate_grad_batches": 3, "gradient_clip_val": clip}
            trainer = L.Trainer(callbacks=callbacks, **settings)
            trainer.fit(model, loader(digits(700), drop_last=False))
            results.append((model.state_dict(), torch.get_rng_state()))
        for state, random_state in results[1:]:
            assert all(torch.equal(state[key], value) for key, value in results[0][0].items())
            assert torch.equal(random_state, results[0][1])


class CountHostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host (item, bool, float) per optimizer step."""

    def __init__(self, trainer_box: list) -> None:
        super().__init__()
        self.trainer_box = trainer_box
        self.counts: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.equal.default:
            step = self.trainer_box[0].global_step
            self.counts[step] = self.counts.get(step, 0) + 1
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation_between_log_steps(monkeypatch):
    """Same reads as without the callback; `tolist`, `numpy` and `cpu` bypass dispatch and are counted apart."""
    reads: dict[bool, dict[int, int]] = {}
    for with_callback in (False, True):
        callbacks = [GradientNoiseScaleCallback(every_n_steps=1)] if with_callback else []
        settings = QUIET | {"max_steps": 25, "accumulate_grad_batches": 2, "log_every_n_steps": 10}
        trainer = L.Trainer(callbacks=callbacks, **settings)
        counter = CountHostReads([trainer])
        for name in ("tolist", "numpy", "cpu", "item"):
            original = getattr(Tensor, name)

            def counted(self, *args, _original=original, _counter=counter, _trainer=trainer, **kwargs):
                _counter.counts[_trainer.global_step] = _counter.counts.get(_trainer.global_step, 0) + 1
                return _original(self, *args, **kwargs)

            monkeypatch.setattr(Tensor, name, counted)
        with counter:
            trainer.fit(DigitsMLP(lr=0.1), loader(digits()))
        monkeypatch.undo()
        reads[with_callback] = counter.counts
    between = [step for step in range(1, 25) if step % 10]
    assert [reads[True].get(step, 0) for step in between] == [reads[False].get(step, 0) for step in between]
    # the log steps do read, so the counter works
    assert reads[True][10] > reads[False].get(10, 0)


class KillAt(L.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("killed")


class FailAt(L.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise RuntimeError("failed")


class TestLifeCycle:
    @pytest.mark.parametrize("every_n_steps", [1, 3, None])
    def test_resumed_equals_uninterrupted(self, tmp_path, every_n_steps):
        def run(directory, epochs, callbacks=(), ckpt_path=None):
            callback = GradientNoiseScaleCallback(every_n_steps=every_n_steps, ema_decay=0.9)
            checkpoint = ModelCheckpoint(directory, save_last=True)
            settings = QUIET | {"enable_checkpointing": True, "max_epochs": epochs, "accumulate_grad_batches": 2}
            trainer = L.Trainer(callbacks=[callback, checkpoint, *callbacks], log_every_n_steps=7, **settings)
            model = DigitsMLP(lr=0.05, optimizer="Adam")
            # the same order in every epoch, or the resumed run would see other data
            trainer.fit(model, DataLoader(digits(300), 32), ckpt_path=ckpt_path)
            return callback

        whole = run(tmp_path / "whole", 6)
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "killed", 6, [KillAt(3)])
        resumed = run(tmp_path / "resumed", 6, ckpt_path=tmp_path / "killed" / "last.ckpt")
        for name in ("grad_sq_norm", "cov_trace", "noise_scale", "lower", "upper"):
            assert getattr(resumed.estimate(), name) == pytest.approx(getattr(whole.estimate(), name), rel=1e-6)
        assert resumed.estimate().num_measurements == whole.estimate().num_measurements > 0
        assert resumed.estimate().batch_size == whole.estimate().batch_size == 64
        # the file opens without arbitrary code
        state = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
        assert any("GradientNoiseScaleCallback" in key for key in state["callbacks"])

    def test_one_state_in_a_checkpoint_for_each_prefix_and_probe(self):
        keys = {
            GradientNoiseScaleCallback(probe, prefix=prefix).state_key
            for probe in ("auto", "micro_batch")
            for prefix in ("gns", "other")
        }
        assert len(keys) == 4

    def test_evaluating_a_checkpoint_keeps_the_estimate(self, tmp_path):
        class Model(DigitsMLP):
            def test_step(self, batch, batch_idx):
                self.log("loss", self.training_step(batch, batch_idx))

        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
        settings = {"enable_checkpointing": True, "max_epochs": 3}
        model = Model()
        callback, trainer = measure(model, loader(digits(256)), steps=-1, callbacks=[saver], trainer_args=settings)
        estimate = callback.estimate()
        trainer.test(model, DataLoader(digits(64), 32), tmp_path / "step=2.ckpt", verbose=False)
        assert callback.estimate() == estimate

    def test_fit_after_a_failed_fit_measures_the_same(self):
        callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0)
        model = DigitsMLP()
        settings = QUIET | {"max_steps": 20, "accumulate_grad_batches": 2}
        with pytest.raises(RuntimeError, match="failed"):
            L.Trainer(callbacks=[callback, FailAt(5)], **settings).fit(model, loader(digits()))
        assert not any(p._backward_hooks for p in model.parameters())
        L.Trainer(callbacks=[callback], **settings).fit(model, loader(digits()))
        fresh, _ = measure(DigitsMLP(), loader(digits()), accumulate=2, steps=20)
        assert callback.estimate() == fresh.estimate()
        assert not any(p._backward_hooks for p in model.parameters())

    def test_second_fit_starts_afresh(self):
        callback = GradientNoiseScaleCallback(every_n_steps=1)
        for _ in range(2):
            settings = QUIET | {"max_steps": 20, "accumulate_grad_batches": 2}
            L.Trainer(callbacks=[callback], **settings).fit(DigitsMLP(), loader(digits()))
            assert callback.estimate().num_measurements == 20

    def test_parameters_unfrozen_later_are_measured(self):
        class Unfreeze(L.Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                pl_module.net[0].requires_grad_(trainer.current_epoch > 0)

        model, data = DigitsMLP(), digits(256)
        model.net[0].requires_grad_(False)
        callback, _ = measure(model, loader(data), steps=8, callbacks=[Unfreeze()])
        callback_2, _ = measure(DigitsMLP(), loader(data, seed=0), steps=8)
        # first epoch (2 steps) without the first layer, the others as ever
        assert callback.estimate().num_measurements == 8
        assert 0.6 < callback.estimate().cov_trace / callback_2.estimate().cov_trace < 1

    @pytest.mark.parametrize("saver_first", [True, False])
    def test_interrupted_run_saves_without_communicating(self, tmp_path, monkeypatch, saver_first):
        """Another rank may be dead: waiting for it would lose the checkpoint."""
        calls = []
        original = Measurements.synchronize
        monkeypatch.setattr(
            Measurements, "synchronize", lambda self, **ranks: calls.append(ranks) or original(self, **ranks)
        )
        callback = GradientNoiseScaleCallback(every_n_steps=1)

        class TwoRanks(L.Callback):  # ahead of the exception: from here on Lightning believes in two ranks
            def on_exception(self, trainer, pl_module, exception):
                monkeypatch.setattr(type(trainer.strategy), "world_size", 2, raising=False)
                monkeypatch.setattr(L.Trainer, "world_size", 2)

        class Save(L.Callback):  # Lightning moves its own savers behind all other callbacks
            def on_exception(self, trainer, pl_module, exception):
                trainer.save_checkpoint(tmp_path / "on_exception.ckpt")

        callbacks = [Save(), callback] if saver_first else [OnExceptionCheckpoint(tmp_path), callback]
        settings = QUIET | {"enable_checkpointing": True, "max_steps": 20, "accumulate_grad_batches": 2}
        trainer = L.Trainer(callbacks=[TwoRanks(), *callbacks, FailAt(9)], **settings)
        with pytest.raises(RuntimeError, match="failed"):
            trainer.fit(DigitsMLP(), loader(digits()))
        assert (tmp_path / "on_exception.ckpt").exists()
        assert calls == []

    @pytest.mark.parametrize("saver_first", [True, False])
    def test_interrupted_run_on_one_device_loses_nothing(self, tmp_path, saver_first):
        class Save(L.Callback):
            def on_exception(self, trainer, pl_module, exception):
                trainer.save_checkpoint(tmp_path / "on_exception.ckpt")

        callback = GradientNoiseScaleCallback(every_n_steps=1)
        callbacks = [Save(), callback] if saver_first else [OnExceptionCheckpoint(tmp_path), callback]
        settings = QUIET | {"enable_checkpointing": True, "max_steps": 20, "accumulate_grad_batches": 2}
        trainer = L.Trainer(callbacks=[*callbacks, FailAt(9)], **settings)
        with pytest.raises(RuntimeError, match="failed"):
            trainer.fit(DigitsMLP(), loader(digits()))
        assert callback.estimate().num_measurements == 4
        states = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["callbacks"]
        later = GradientNoiseScaleCallback()
        later.load_state_dict(states[callback.state_key])
        assert later.estimate() == callback.estimate()

    def test_learning_rate_finder(self, tmp_path):
        finder = LearningRateFinder(num_training_steps=8)
        model, data = DigitsMLP(lr=1e-4), digits()
        callback = GradientNoiseScaleCallback(every_n_steps=1)
        settings = QUIET | {"enable_checkpointing": True, "max_steps": 20, "accumulate_grad_batches": 2}
        L.Trainer(callbacks=[finder, callback], default_root_dir=tmp_path, **settings).fit(model, loader(data))
        assert callback.estimate().num_measurements == 20
        assert callback._measurements[0].metric.rejected == dict.fromkeys(Rejection, 0)

    def test_reset(self):
        callback, _ = measure(DigitsMLP(), loader(digits()), steps=10)
        callback.reset()
        assert callback.estimate().num_measurements == 0
        assert math.isnan(callback.estimate().noise_scale)


def test_nan_batch_is_dropped_counted_and_said_once(recwarn):
    class Poison(DigitsMLP):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if batch_idx == 5 else loss

        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            for parameter in self.parameters():  # keep the weights alive; this comes after the callback's hook
                parameter.grad.nan_to_num_(0.0)

    callback, _ = measure(Poison(), loader(digits(512)), accumulate=2, steps=32)
    # 8 steps an epoch, one of them poisoned
    assert callback._measurements[0].metric.rejected[Rejection.NON_FINITE] == 4
    assert callback.estimate().num_measurements == 28
    assert math.isfinite(callback.estimate().cov_trace)
    said = [w for w in recwarn if "NaN or infinite" in str(w.message)]
    assert len(said) == 1


def test_edited_gradients_are_dropped_with_a_likely_cause():
    class Edit(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                parameter.grad.mul_(1.2)

    with pytest.warns(UserWarning, match="do not add up to the gradient that the optimizer uses.*PowerSGD"):
        callback, _ = measure(DigitsMLP(), loader(digits()), accumulate=2, steps=10, callbacks=[Edit()])
    assert callback._measurements[0].metric.rejected[Rejection.MISMATCH] == 10
    assert callback.estimate().num_measurements == 0


def test_accumulation_changed_in_mid_window_is_caught():
    """Lightning zeroes gradients where the batch index divides: a change from 2 to 4 at batch 2 keeps old ones."""

    class Change(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                trainer.accumulate_grad_batches = 4

    model, data = DigitsMLP(), digits(32 * 8)
    callback, _ = measure(
        model, loader(data), accumulate=2, trainer_args={"max_epochs": 1, "max_steps": -1}, callbacks=[Change()]
    )
    rejected = callback._measurements[0].metric.rejected
    # batches 0-1 are sound; 2-3 are added to what batches 0-1 left; 4-7 are sound
    assert callback.estimate().num_measurements == 2
    assert rejected[Rejection.MISMATCH] <= 1


def test_skipped_training_steps():
    class Skip(DigitsMLP):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 4 == 1 else super().training_step(batch, batch_idx)

    model, data = Skip(), digits()
    callback, _ = measure(model, loader(data), steps=100)
    assert callback.estimate().num_measurements == 100
    assert_true_within(callback, per_example_gradients(model, data), [[32] * 3] * 14)


def test_lightning_cli_builds_it_from_plain_arguments(tmp_path):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(GradientNoiseScaleCallback, "gns")
    config = parser.parse_args(
        ["--gns.every_n_steps=2", "--gns.unit=tokens", "--gns.batch_size_fn=helpers.frozen_digits.first_length"]
    )
    callback = parser.instantiate_classes(config).gns
    assert (callback.every_n_steps, callback.unit, callback.batch_size_fn) == (2, "tokens", first_length)
