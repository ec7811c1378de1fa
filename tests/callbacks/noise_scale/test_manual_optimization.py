"""Manual optimization and several optimizers: one estimate each, exact in a step, refused in words where not."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader, per_example_gradients, textbook_pair
from helpers.gan import GAN, gan_data, gan_samples
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.noise_scale.samples import Rejection


class ManualDigits(DigitsMLP):
    """The digits MLP, stepped by hand every ``accumulate`` batches."""

    def __init__(self, accumulate: int = 1, divide: float = 1.0, clip: str | None = None, parts: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.accumulate, self.divide, self.clip, self.parts = accumulate, divide, clip, parts

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(self.parts):
            self.manual_backward(super().training_step(batch, batch_idx) / self.divide / self.parts)
        if (batch_idx + 1) % self.accumulate == 0:
            if self.clip == "by_hand":
                self.clip_gradients(optimizer, gradient_clip_val=1e-3)
            optimizer.step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer):
        if self.clip == "in_hook":
            nn.utils.clip_grad_norm_(self.parameters(), 1e-3)


def measure(model, data, steps=1, trainer_args=None, **arguments):
    callback = GradientNoiseScaleCallback(**({"every_n_steps": 1, "ema_decay": 1.0} | arguments))
    trainer = L.Trainer(callbacks=[callback], **(QUIET | {"max_steps": steps} | (trainer_args or {})))
    trainer.fit(model, data)
    return callback


def rejected(callback, optimizer=0):
    return callback._measurements[optimizer].metric.rejected


def assert_pair(estimate, expected, factor=1.0):
    # float32 gradients; |G|² is a difference of norms that nearly cancel
    assert estimate.cov_trace == pytest.approx(expected[1] * factor**2, rel=1e-4)
    assert estimate.grad_sq_norm == pytest.approx(expected[0] * factor**2, rel=1e-4, abs=1e-5 * expected[1] * factor**2)


class TestOneOptimizer:
    def test_accumulated_by_hand(self):
        data = digits(64)
        samples = per_example_gradients(DigitsMLP(), data).reshape(4, 16, -1).mean(1)
        expected = textbook_pair(samples, [16] * 4)
        for divide, factor in ((4.0, 1.0), (1.0, 4.0)):
            """The losses' sum is what the optimizer follows, whatever they are divided by."""
            callback = measure(ManualDigits(4, divide), DataLoader(data, 16), probe="micro_batch")
            assert_pair(callback.estimate(), expected, factor)
            assert callback.estimate().batch_size == 64
            assert callback.advise().configuration.accumulate_grad_batches == 4

    def test_one_backward_pass_a_step_is_measured_by_example(self):
        data = digits(32)
        gradients = per_example_gradients(DigitsMLP(), data)
        callback = measure(ManualDigits(), DataLoader(data, 32))
        assert callback.estimate().probe == "per_example"
        assert_pair(callback.estimate(), textbook_pair(gradients, [1] * 32))

    def test_micro_batches_without_accumulation_measure_nothing(self):
        callback = measure(ManualDigits(), loader(digits(128)), steps=4, probe="micro_batch")
        assert rejected(callback)[Rejection.SINGLE_SAMPLE] == 4

    def test_several_backward_calls_on_a_batch_are_left_out(self):
        with pytest.warns(UserWarning, match="several backward calls for one optimizer in one training step"):
            callback = measure(ManualDigits(2, parts=2), loader(digits(256)), steps=4, probe="micro_batch")
        assert rejected(callback)[Rejection.IRREGULAR] == 4
        # the optimizer's gradient tells all that successive steps need
        callback = measure(ManualDigits(parts=2), DataLoader(digits(32), 16), steps=2, probe="consecutive")
        samples = per_example_gradients(DigitsMLP(), digits(32)).reshape(2, 16, -1).mean(1)
        assert_pair(callback.estimate(), textbook_pair(samples, [16, 16]))

    @pytest.mark.parametrize("probe", ["micro_batch", "consecutive"])
    def test_gradients_clipped_by_hand_are_left_out_and_in_the_hook_are_not(self, probe):
        with pytest.warns(UserWarning, match=r"clip them in `on_before_optimizer_step`"):
            callback = measure(ManualDigits(2, clip="by_hand"), loader(digits(256)), steps=4, probe=probe)
        assert rejected(callback)[Rejection.IRREGULAR] == (4 if probe == "micro_batch" else 3)
        callback = measure(ManualDigits(2, clip="in_hook"), loader(digits(256)), steps=4, probe=probe)
        assert not sum(rejected(callback).values())
        assert callback.estimate().num_measurements == (4 if probe == "micro_batch" else 3)

    def test_a_scaler(self):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        data = digits(64)
        callback = measure(ManualDigits(2), DataLoader(data, 32), probe="micro_batch", trainer_args={"plugins": plugin})
        samples = per_example_gradients(DigitsMLP(), data).reshape(2, 32, -1).mean(1)
        expected = textbook_pair(samples, [32, 32])
        # float16 activations: ten percent is what is asked of 16-bit runs
        assert callback.estimate().cov_trace == pytest.approx(4 * expected[1], rel=0.1)

    def test_a_resumed_run_goes_on_counting_its_steps(self, tmp_path):
        """Steps 0 and 3 of the first epoch, step 6 of the second; counted anew it would be 4 and 7."""
        measured = []
        for epochs, ckpt_path in ((1, None), (2, tmp_path / "last.ckpt")):
            callback = GradientNoiseScaleCallback("micro_batch", every_n_steps=3)
            saver = ModelCheckpoint(tmp_path, save_last=True)
            trainer = L.Trainer(
                callbacks=[callback, saver], max_epochs=epochs, **(QUIET | {"enable_checkpointing": True})
            )
            trainer.fit(ManualDigits(2), DataLoader(digits(256), 32), ckpt_path=ckpt_path)
            measured.append(callback.estimate().num_measurements)
        assert measured == [2, 3]

    def test_several_steps_on_one_batch(self):
        class Repeats(ManualDigits):
            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                for _ in range(3):
                    optimizer.zero_grad()
                    self.manual_backward(DigitsMLP.training_step(self, batch, batch_idx))
                    optimizer.step()

        callback = measure(Repeats(), loader(digits(128)), steps=12, probe="consecutive")
        assert callback.estimate().num_measurements == 11
        # the forward passes of the later steps of a batch were not watched
        callback = measure(Repeats(), loader(digits(128)), steps=12, probe="per_example")
        assert callback.estimate().num_measurements == 4


class TestSeveralOptimizers:
    @pytest.mark.parametrize("first", ["generator", "discriminator"])
    @pytest.mark.parametrize(("toggle", "set_to_none"), [(True, True), (False, True), (False, False)])
    def test_each_has_its_own_estimate(self, toggle, set_to_none, first):
        """The generator's pass through the discriminator is none of the discriminator's samples."""
        model = GAN(toggle=toggle, set_to_none=set_to_none, first=first)
        callback = measure(model, DataLoader(gan_data(), 16), steps=4)
        for index, name in enumerate(("generator", "discriminator")):
            estimate = callback.estimate(optimizer=index)
            assert (estimate.probe, estimate.num_measurements, estimate.batch_size) == ("batch_pair", 1, 16)
            assert_pair(estimate, textbook_pair(gan_samples(name), [16, 16]))

    def test_names(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, save_last=True)
        callback = GradientNoiseScaleCallback(every_n_steps=1, groups={"weights": "*.weight"})
        settings = QUIET | {"enable_checkpointing": True, "max_epochs": 3, "log_every_n_steps": 2}
        trainer = L.Trainer(callbacks=[callback, saver], **settings)
        trainer.fit(GAN(toggle=True), DataLoader(gan_data(), 8))
        assert set(callback.estimates()) == {
            f"optimizer_{index}/{name}" for index in (0, 1) for name in ("total", "weights")
        }
        assert "gns/optimizer_1/noise_scale" in trainer.callback_metrics
        assert "gns/optimizer_0/weights/cov_trace" in trainer.callback_metrics
        with pytest.raises(
            ValueError, match=r"`optimizer` must be named .* give one of \[0, 1\], or use `estimates\(\)`"
        ):
            callback.estimate()
        with pytest.raises(ValueError, match=r"`optimizer` must be None or one of \[0, 1\], got 2"):
            callback.advise(2)
        assert callback.advise(1).estimate == callback.estimate(1)
        # every batch has two optimizer steps and one x-axis step
        assert callback.estimate(0).num_measurements == 11
        later = GradientNoiseScaleCallback(every_n_steps=1, groups={"weights": "*.weight"})
        trainer = L.Trainer(callbacks=[later], **(QUIET | {"max_epochs": 4}))
        trainer.fit(GAN(toggle=True), DataLoader(gan_data(), 8), ckpt_path=tmp_path / "last.ckpt")
        assert later.estimate(1).num_measurements == 14  # the first step after a resume has no predecessor

    def test_group_of_one_optimizer_only(self):
        with pytest.raises(ValueError, match=r"`groups\['g'\]='generator'` matches no trainable parameter"):
            measure(GAN(toggle=True), DataLoader(gan_data(), 8), groups={"g": "generator"})

    def test_by_example_is_refused(self):
        with pytest.raises(
            ValueError, match=r"`probe='per_example'` .* this run has 2 optimizers; use `probe='batch_pair'`"
        ):
            measure(GAN(toggle=True), DataLoader(gan_data(), 8), probe="per_example")

    def test_training_is_the_same_bit_for_bit(self):
        states = []
        for callbacks in ([], [GradientNoiseScaleCallback(every_n_steps=1)]):
            for toggle in (True, False):
                model = GAN(toggle=toggle, lr=0.1)
                L.Trainer(callbacks=callbacks, max_epochs=3, **QUIET).fit(model, DataLoader(gan_data(), 8))
                states.append(model.state_dict())
        for without, with_callback in ((states[0], states[2]), (states[1], states[3])):
            assert all(torch.equal(with_callback[key], value) for key, value in without.items())
