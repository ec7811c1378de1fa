"""AdaptiveBatchSizeCallback on one device: the same training by hand, life cycle, checkpoints, logs."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.adaptive_runs import Factors, Model, batches_in_order, changes_in, starts_of, train_by_hand, windows_of
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_wn import AdaptiveBatchSizeCallback, GradientNoiseScaleCallback
from lightning_wn.noise_scale.samples import Rejection
from lightning_wn.reports.history import read_csv_history

# 11 micro-batches an epoch. Worked out by hand: 4 is due at batch 6, which it does not divide, and comes at 8;
# the windows of 4, 3 and 5 end short with their epochs
SCHEDULE = {0: 1, 2: 2, 4: 4, 6: 3, 10: 1, 21: 5}
WINDOWS = [[1, 1, 2, 2, 2, 3], [3, 3, 3, 2], [1] * 11, [5, 5, 1]]
FACTORS = [[1, 1, 2, 2, 2, 4], [3, 3, 3, 3], [1] * 11, [5, 5, 5]]
ROOTS = [[math.sqrt(factor) for factor in epoch] for epoch in FACTORS]


def fit(callback, model=None, data=None, *, others=(), before=(), ckpt_path=None, **settings):
    factors = Factors()
    settings = QUIET | {"max_epochs": 4, "precision": "64-true"} | settings
    trainer = L.Trainer(callbacks=[*before, callback, *others, factors], **settings)
    model = model or Model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*measured nothing.*|.*is approximate.*")
        trainer.fit(model, data or batches_in_order(), ckpt_path=ckpt_path)
    return model, trainer, factors.epochs


def assert_same_weights(model, reference):
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        # float64 and another order of summing
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class TestSameAsByHand:
    @pytest.mark.parametrize("optimizer", ["momentum", "adam"])
    @pytest.mark.parametrize("clip", [None, 0.3])
    def test_along_a_schedule(self, optimizer, clip):
        callback = AdaptiveBatchSizeCallback(schedule=SCHEDULE)
        model, trainer, epochs = fit(callback, Model(optimizer), gradient_clip_val=clip)
        reference = Model(optimizer)
        train_by_hand(reference, list(batches_in_order()), WINDOWS, ROOTS, clip=clip)
        assert [windows_of(epoch) for epoch in epochs] == WINDOWS
        assert trainer.global_step == sum(map(len, WINDOWS))
        assert_same_weights(model, reference)

    @pytest.mark.parametrize("optimizer", ["momentum", "adam"])
    @pytest.mark.parametrize("scheduler", ["exponential", "lambda"])
    @pytest.mark.parametrize("clock", ["auto", "steps"])
    def test_with_a_scheduler(self, optimizer, scheduler, clock):
        """By batches a scheduler steps once a micro-batch, for that was the first window."""
        callback = AdaptiveBatchSizeCallback(schedule=SCHEDULE, scheduler_clock=clock)
        model, trainer, _ = fit(callback, Model(optimizer, scheduler))
        reference = Model(optimizer, scheduler)
        steps = (lambda batches: batches) if clock == "auto" else (lambda batches: 1)
        train_by_hand(reference, list(batches_in_order()), WINDOWS, ROOTS, steps_per_window=steps)
        assert_same_weights(model, reference)
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == (44 if clock == "auto" else 24)

    @pytest.mark.parametrize("where", ["before", "after"])
    def test_toward_the_noise_scale(self, where):
        """With the noise-scale callback on either side, which must not see the rescaling as an error."""
        noise_scale = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=0.9)
        callback = AdaptiveBatchSizeCallback(
            6.0, growth=3.0, every_n_steps=3, allow_decrease=True, max_accumulate=7, learning_rate="linear"
        )
        place = {"before": [noise_scale]} if where == "before" else {"others": [noise_scale]}
        model, _, epochs = fit(callback, Model("momentum"), log_every_n_steps=2, **place)
        windows = [windows_of(epoch) for epoch in epochs]
        assert changes_in(epochs) >= 2
        assert any(lengths[-1] < epoch[-1] for lengths, epoch in zip(windows, epochs, strict=True))
        rates = [[float(epoch[start]) for start in starts_of(epoch)] for epoch in epochs]
        reference = Model("momentum")
        train_by_hand(reference, list(batches_in_order()), windows, rates)
        assert_same_weights(model, reference)
        rejected = noise_scale._measurements[0].metric.rejected
        assert rejected[Rejection.MISMATCH] == 0
        # only windows of one micro-batch measure nothing, and only after the probe that needs two of them has come
        alone = sum(lengths.count(1) for lengths in windows)
        assert noise_scale.estimate().num_measurements >= sum(map(len, windows)) - alone

    def test_both_orders_measure_and_decide_the_same(self):
        estimates, paths = [], []
        for where in ("before", "others"):
            noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
            callback = AdaptiveBatchSizeCallback(schedule={0: 2, 2: 4, 4: 3})
            _, _, epochs = fit(callback, log_every_n_steps=2, accumulate_grad_batches=2, **{where: [noise_scale]})
            estimates.append(noise_scale.estimate())
            paths.append(epochs)
        assert paths[0] == paths[1]
        # not one of them sees the probe change: all windows have two micro-batches or more
        for name in ("num_measurements", "noise_scale", "cov_trace", "grad_sq_norm", "lower", "upper"):
            assert getattr(estimates[0], name) == pytest.approx(getattr(estimates[1], name), rel=1e-9)

    def test_a_skipped_micro_batch_is_no_part_of_the_mean(self):
        class Skips(Model):
            def training_step(self, batch, batch_idx):
                return None if batch_idx == 1 else super().training_step(batch, batch_idx)

        model, _, _ = fit(AdaptiveBatchSizeCallback(schedule={0: 4}), Skips(), max_epochs=1)
        data = list(batches_in_order())
        reference = Model()
        train_by_hand(reference, [data[0], *data[2:]], [[3, 4, 3]], [[1.0] * 3])
        assert_same_weights(model, reference)


class TestSchedules:
    def test_by_epoch(self):
        _, _, epochs = fit(AdaptiveBatchSizeCallback(schedule={1: 2, 3: 11}, schedule_by="epoch"))
        assert [windows_of(epoch) for epoch in epochs] == [[1] * 11, [2] * 5 + [1], [2] * 5 + [1], [11]]

    def test_by_examples(self):
        """165 an epoch: 48 are there after 3 batches, where 2 does not divide; 181 after one of the second epoch."""
        _, _, epochs = fit(AdaptiveBatchSizeCallback(schedule={48: 2, 181: 3}, schedule_by="examples"), max_epochs=2)
        assert epochs == [[1] * 4 + [2] * 7, [2] * 6 + [3] * 5]

    def test_by_tokens_that_are_counted_on_the_device(self):
        callback = AdaptiveBatchSizeCallback(
            schedule={480: 2}, schedule_by="tokens", batch_size_fn=lambda batch: torch.full((len(batch[1]),), 10)
        )
        assert fit(callback, max_epochs=1)[2] == [[1] * 4 + [2] * 7]

    def test_the_trainers_own_factor_is_the_first(self):
        model, _, epochs = fit(AdaptiveBatchSizeCallback(schedule={3: 4}), accumulate_grad_batches=2, max_epochs=1)
        assert epochs == [[2] * 8 + [4] * 3]
        reference = Model()
        train_by_hand(reference, list(batches_in_order()), [[2, 2, 2, 2, 3]], [[1.0] * 4 + [2**0.5]])
        assert_same_weights(model, reference)

    def test_a_schedule_over_the_data_comes_to_its_end(self):
        """OneCycleLR raises at one step too many."""

        class Cycle(Model):
            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                steps = int(self.trainer.estimated_stepping_batches)
                scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1)
                return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        callback = AdaptiveBatchSizeCallback(schedule={2: 4, 5: 6})
        _, trainer, _ = fit(callback, Cycle(), accumulate_grad_batches=2)
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 6 * 4
        assert trainer.global_step < 6 * 4


class TestLearningRate:
    def test_by_the_noise_scale_at_the_change(self):
        noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
        callback = AdaptiveBatchSizeCallback(schedule={18: 4}, learning_rate="sgd")
        seen = {}

        class AtTheChange(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.accumulate_grad_batches == 4 and not seen:
                    # in the unit of the first batch size
                    seen["N"] = noise_scale.estimate().noise_scale / (2 * 16)

        fit(callback, others=[AtTheChange()], before=[noise_scale], accumulate_grad_batches=2, log_every_n_steps=1)
        assert math.isfinite(seen["N"])
        assert callback.learning_rate_factor == pytest.approx((1 + seen["N"]) / (1 + seen["N"] / 2))

    @pytest.mark.parametrize(("schedule", "last"), [({0: 2}, 0.1), ({0: 1, 1: 2}, 0.2)])
    def test_a_gradient_scaler(self, schedule, last):
        """float16 on the CPU, with a scale so large that the first steps are skipped."""
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
        callback = AdaptiveBatchSizeCallback(schedule=schedule, learning_rate="linear")
        rates = _Rates()
        trainer = L.Trainer(callbacks=[callback, rates], **QUIET, max_epochs=2, plugins=[plugin])
        trainer.fit(DigitsMLP(lr=0.1), loader(digits(320)))
        assert set(rates.outside) == {0.1}
        assert 0 < len(rates.inside) < trainer.global_step
        assert rates.inside[-1] == last

    def test_an_exception_in_the_step(self):
        steps = []

        class Breaks(torch.optim.SGD):
            def step(self, closure=None):
                closure()
                steps.append(self.param_groups[0]["lr"])
                if len(steps) == 5:
                    raise RuntimeError("in the middle")

        model = DigitsMLP(lr=0.1)
        optimizer = Breaks(model.parameters(), lr=0.1)
        model.configure_optimizers = lambda: optimizer
        # the fifth step has another learning rate
        callback = AdaptiveBatchSizeCallback(schedule={0: 1, 1: 4}, learning_rate="linear")
        trainer = L.Trainer(callbacks=[callback], max_epochs=1, **QUIET)
        with pytest.raises(RuntimeError, match="in the middle"):
            trainer.fit(model, loader(digits(320)))
        assert steps == [0.1] * 4 + [0.4]
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert trainer.accumulate_grad_batches == 1


class _Rates(L.Callback):
    """The learning rate within optimizer steps and outside."""

    def __init__(self):
        self.inside, self.outside = [], []

    def on_train_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        # after the adaptive callback's own hook
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.inside.append(optimizer.param_groups[0]["lr"]))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.outside.append(trainer.optimizers[0].param_groups[0]["lr"])


class TestLifeCycle:
    def test_a_second_fit_starts_afresh(self):
        callback = AdaptiveBatchSizeCallback(schedule=SCHEDULE)
        first, trainer, epochs = fit(callback)
        assert callback.accumulate_grad_batches == 5
        assert trainer.accumulate_grad_batches == 1
        assert not trainer.optimizers[0]._optimizer_step_pre_hooks
        second, _, again = fit(callback)
        assert epochs == again
        assert_same_weights(first, second)

    def test_never_beyond_an_epoch(self):
        """Whatever the noise scale says, a window is no longer than an epoch."""
        noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
        callback = AdaptiveBatchSizeCallback(1e9, growth=100.0, every_n_steps=1)
        _, _, epochs = fit(callback, before=[noise_scale], log_every_n_steps=1, accumulate_grad_batches=2)
        assert max(map(max, epochs)) == 11 or max(map(max, epochs)) == 10

    def test_warmup_and_the_fewest_steps_between_changes(self):
        noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
        callback = AdaptiveBatchSizeCallback(1e9, growth=1.01, every_n_steps=3, warmup_steps=7)
        _, _, epochs = fit(callback, before=[noise_scale], log_every_n_steps=1, accumulate_grad_batches=2, max_epochs=6)
        steps = [epoch[start] for epoch in epochs for start in starts_of(epoch)]
        assert steps[:7] == [2] * 7
        runs = [steps.count(factor) for factor in sorted(set(steps))]
        assert len(runs) > 2
        assert all(run >= 3 for run in runs[:-1])

    def test_an_approximate_noise_scale_is_not_followed(self):
        model = Model()
        model.net.insert(1, nn.BatchNorm1d(32).double())
        noise_scale = GradientNoiseScaleCallback("consecutive", every_n_steps=1)
        callback = AdaptiveBatchSizeCallback(10.0, every_n_steps=1)
        with pytest.warns(UserWarning, match="does not follow an approximate noise scale"):
            L.Trainer(
                callbacks=[noise_scale, callback], **QUIET, max_epochs=1, log_every_n_steps=1, precision="64-true"
            ).fit(model, batches_in_order())
        assert callback.accumulate_grad_batches == 1

    def test_stochastic_weight_averaging_has_its_last_epoch(self):
        model = Model()
        model.net.insert(1, nn.BatchNorm1d(32).double())
        averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
        callback = AdaptiveBatchSizeCallback(schedule={0: 2, 6: 4, 12: 3})
        _, trainer, epochs = fit(callback, model, others=[averaging], max_epochs=3)
        # 3 is due in the epoch that makes no step
        assert epochs == [[2] * 11, [4] * 11, [4] * 11, [12] * 11]
        assert trainer.accumulate_grad_batches == 1

    def test_something_else_that_changes_the_factor(self):
        class Other(L.Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                trainer.accumulate_grad_batches = 3

        with pytest.raises(RuntimeError, match="was changed from 2 to 3 while `AdaptiveBatchSizeCallback` looks after"):
            fit(AdaptiveBatchSizeCallback(schedule={4: 4}), others=[Other()], accumulate_grad_batches=2)

    def test_logged(self, tmp_path):
        noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
        callback = AdaptiveBatchSizeCallback(schedule={0: 2, 4: 4})
        logger = CSVLogger(tmp_path)
        _, trainer, _ = fit(callback, others=[noise_scale], logger=logger, log_every_n_steps=2, max_epochs=2)
        history = read_csv_history(logger.log_dir, prefix="adaptive")
        assert history["step"] == [1.0, 3.0, 5.0, 7.0]
        assert history["adaptive/accumulate_grad_batches"] == [2.0, 2.0, 4.0, 4.0]
        assert history["adaptive/learning_rate_factor"] == pytest.approx([1.0, 1.0, 2**0.5, 2**0.5])
        assert history["adaptive/batch_size"][1:] == [32.0, 64.0, 64.0]
        assert trainer.callback_metrics["adaptive/accumulate_grad_batches"] == 4.0
        assert trainer.callback_metrics["adaptive/target_batch_size"] == 64.0


class _Kill(L.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("killed")


class TestCheckpoints:
    @pytest.mark.parametrize("kind", ["noise_scale", "schedule", "examples", "batch_norm"])
    @pytest.mark.parametrize("epoch", [1, 2, 3])
    def test_resumed_equals_uninterrupted(self, tmp_path, kind, epoch):
        def run(name, *others, ckpt_path=None):
            model = Model("adam", "exponential")
            if kind == "batch_norm":
                model.net.insert(1, nn.BatchNorm1d(32).double())
            callback = {
                "noise_scale": lambda: AdaptiveBatchSizeCallback(6.0, every_n_steps=2, allow_decrease=True),
                "schedule": lambda: AdaptiveBatchSizeCallback(schedule=SCHEDULE),
                "examples": lambda: AdaptiveBatchSizeCallback(
                    schedule={100: 2, 200: 4, 333: 3}, schedule_by="examples", learning_rate="adam"
                ),
                "batch_norm": lambda: AdaptiveBatchSizeCallback(schedule={2: 2, 14: 4}),
            }[kind]()
            noise_scale = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=0.9)
            saver = ModelCheckpoint(tmp_path / name, save_last=True)
            factors = Factors()
            settings = QUIET | {"max_epochs": 4, "log_every_n_steps": 3, "precision": "64-true"}
            settings["enable_checkpointing"] = True
            trainer = L.Trainer(callbacks=[noise_scale, callback, saver, factors, *others], **settings)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.fit(model, batches_in_order(), ckpt_path=ckpt_path)
            return model, callback, noise_scale, factors.epochs

        whole, whole_callback, whole_noise, epochs = run("whole")
        assert len({factor for epoch in epochs for factor in epoch}) > 2
        with pytest.raises(RuntimeError, match="killed"):
            run("killed", _Kill(epoch))
        last = Path(tmp_path, "killed", "last.ckpt")
        resumed, callback, noise, rest = run("resumed", ckpt_path=last)
        assert rest == epochs[epoch:]
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        assert callback.state_dict() == whole_callback.state_dict()
        assert noise.estimate() == whole_noise.estimate()

    def test_a_checkpoint_changes_no_decision(self, tmp_path):
        """It brings the noise scale up to date between log steps."""
        paths = []
        for saver in ([], [ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)]):
            callback = AdaptiveBatchSizeCallback(0.5, every_n_steps=1, hysteresis=0.0)
            noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
            settings = {"log_every_n_steps": 5, "enable_checkpointing": bool(saver)}
            paths.append(fit(callback, before=[noise_scale], others=saver, **settings)[2])
        assert paths[0] == paths[1]
        assert len({factor for epoch in paths[0] for factor in epoch}) > 1

    def test_resumed_with_other_bounds(self, tmp_path):
        path = tmp_path / "last.ckpt"
        first = {"schedule": {0: 6}, "learning_rate": "linear"}
        fit(AdaptiveBatchSizeCallback(**first), max_epochs=1, others=[_Saver(path)])
        callback = AdaptiveBatchSizeCallback(1e-9, max_accumulate=4, every_n_steps=1)
        noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
        settings = {"log_every_n_steps": 1, "max_epochs": 3}
        _, _, epochs = fit(callback, others=[noise_scale], ckpt_path=path, **settings)
        assert [windows_of(epoch) for epoch in epochs] == [[4, 4, 3]] * 2

    def test_resumed_in_the_middle_of_an_epoch(self, tmp_path):
        """After every window of the second epoch, with changes that are decided and still wait for their batch."""

        class SaveAll(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if trainer.current_epoch == 1 and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                    trainer.save_checkpoint(tmp_path / f"{batch_idx + 1}.ckpt")

        def run(data, *others, ckpt_path=None):
            callback = AdaptiveBatchSizeCallback(6.0, growth=1.5, every_n_steps=1, hysteresis=0.0)
            noise_scale = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=0.9)
            settings = {"log_every_n_steps": 2, "accumulate_grad_batches": 2, "max_epochs": 3}
            model = Model("adam", "exponential")
            fit(
                callback,
                model,
                data,
                before=[noise_scale],
                others=[*others, _ThenWhole(data)],
                ckpt_path=ckpt_path,
                **settings,
            )
            return model, callback.state_dict()

        data = list(batches_in_order(24 * 16))
        whole, state = run(_Rest(data, 0), SaveAll())
        checkpoints = sorted(tmp_path.glob("*.ckpt"))
        waiting = 0
        for path in checkpoints:
            saved = torch.load(path, weights_only=True)["callbacks"]["AdaptiveBatchSizeCallback{'prefix': 'adaptive'}"]
            waiting += saved["wanted"] != saved["accumulate_grad_batches"]
            if int(path.stem) < len(data):
                resumed, again = run(_Rest(data, int(path.stem)), ckpt_path=path)
                assert again == state
                assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        assert waiting

    def test_a_mid_epoch_checkpoint_in_a_window(self, tmp_path):
        """It has lost the gradients so far; the rest of the window is a mean all the same."""

        class Save(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx == 5:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")

        fit(AdaptiveBatchSizeCallback(schedule={0: 4}), others=[Save()], max_epochs=1)
        data = list(batches_in_order())
        rest = _Rest(data, 6)
        resumed, _, _ = fit(
            AdaptiveBatchSizeCallback(schedule={0: 4}),
            data=rest,
            max_epochs=1,
            ckpt_path=tmp_path / "middle.ckpt",
        )
        reference = Model()
        train_by_hand(reference, data[:4] + data[6:], [[4, 2, 3]], [[1.0] * 3])
        assert_same_weights(resumed, reference)


class _Saver(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


class _Rest:
    """A loader that goes on where an epoch was left."""

    def __init__(self, data, start):
        self.data, self.start = data, start

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return iter(self.data[self.start :])


class _ThenWhole(L.Callback):
    """Lets the epochs after that be whole."""

    def __init__(self, loader):
        self.loader = loader

    def on_train_epoch_end(self, trainer, pl_module):
        self.loader.start = 0
