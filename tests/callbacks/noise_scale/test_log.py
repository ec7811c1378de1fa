"""What is logged of the estimates: which keys, at which steps, once; the figures and the lines at the end."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.callbacks.noise_scale.log import NoiseScaleLog
from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.callbacks.noise_scale.optimizer_measurement import ParameterChoice
from lightning_wn.callbacks.noise_scale.run_watch import RunWatch
from lightning_wn.callbacks.worker_results import WorkerResults


def measure(model, data, accumulate=4, steps=400, callbacks=(), trainer_args=None, **callback_args):
    callback_args = {"every_n_steps": 1, "ema_decay": 1.0} | callback_args
    callback = GradientNoiseScaleCallback(**callback_args)
    settings = QUIET | {"max_steps": steps, "accumulate_grad_batches": accumulate} | (trainer_args or {})
    trainer = L.Trainer(callbacks=[callback, *callbacks], **settings)
    trainer.fit(model, data)
    return callback, trainer


class ListLogger(Logger):
    """Keeps what it is given."""

    name, version = "list", 0

    def __init__(self):
        super().__init__()
        self.rows: list[tuple[int, dict]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


KEYS = {
    "gns/noise_scale",
    "gns/noise_scale_lower",
    "gns/noise_scale_upper",
    "gns/grad_sq_norm",
    "gns/cov_trace",
    "gns/batch_size",
    "gns/suggested_batch_size",
}


class TestTheLogItself:
    """Steps of two samples of 32 examples with |g|² = 3 and |ḡ|² = 2: |G|² is 1, tr(Σ) is 64, in groups half of it."""

    def log(self, **choice):
        measurements = Measurements(ParameterChoice(**choice), WorkerResults(), metric_settings={"ema_decay": 1.0})
        logger = ListLogger()
        trainer = L.Trainer(**(QUIET | {"logger": logger}))
        return NoiseScaleLog("gns", measurements, RunWatch()), measurements, trainer, logger.rows

    def measure(self, measurements, trainer=None, log=None, step=0):
        ones = torch.ones(1 + len(measurements.choice.names)).div(2)
        ones[0] = 1.0
        measurements[0].metric.update(3 * ones.expand(2, -1), [32, 32], 2 * ones)
        measurements.synchronize(across_ranks=False)
        if log is not None:
            self.go_to(trainer, log, step)

    def go_to(self, trainer, log, step):
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        log.note_step(trainer)

    def test_the_numbers_under_their_keys(self):
        log, measurements, trainer, rows = self.log(groups={"head": "*"})
        self.measure(measurements, trainer, log, step=7)
        log.write(trainer)
        ((step, row),) = rows
        assert step == 7
        assert row.keys() == KEYS | {key.replace("/", "/head/") for key in KEYS - {"gns/suggested_batch_size"}}
        assert (row["gns/grad_sq_norm"], row["gns/cov_trace"], row["gns/batch_size"]) == (1.0, 64.0, 64.0)
        assert (row["gns/head/grad_sq_norm"], row["gns/head/cov_trace"]) == (0.5, 32.0)
        assert row["gns/suggested_batch_size"] == 64
        assert log.history.series["gns/noise_scale"] == [64.0]
        assert float(trainer.callback_metrics["gns/head/noise_scale"]) == 64.0

    def test_coverage_is_logged_only_below_one(self):
        log, measurements, trainer, rows = self.log()
        measurements[0].coverage = (0.25,)
        self.measure(measurements, trainer, log)
        log.write(trainer)
        assert rows[0][1]["gns/coverage"] == 0.25

    def test_each_step_once_and_nothing_before_a_measurement(self):
        log, measurements, trainer, rows = self.log()
        self.go_to(trainer, log, 1)
        log.write(trainer)
        assert rows == []
        # nothing was written of this step: it still can be
        self.measure(measurements)
        for _ in range(2):
            log.write(trainer)
        assert [step for step, _ in rows] == [1]
        self.measure(measurements, trainer, log, step=3)
        log.write(trainer)
        assert [step for step, _ in rows] == [1, 3]

    def test_a_trainer_that_never_logs(self):
        log, measurements, _, _ = self.log()
        logger = ListLogger()
        trainer = L.Trainer(**(QUIET | {"logger": logger, "log_every_n_steps": 0}))
        self.measure(measurements, trainer, log)
        log.write(trainer)
        assert logger.rows == []

    def test_several_optimizers_have_their_names_in_between(self):
        log, measurements, trainer, rows = self.log()
        weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
        model = DigitsMLP()
        model.extra = torch.nn.ParameterList(weights)
        measurements.attach([torch.optim.SGD([weight], lr=0.1) for weight in weights], model)
        self.measure(measurements, trainer, log)
        log.write(trainer)
        # the second has measured nothing
        assert rows[0][1].keys() == {key.replace("/", "/optimizer_0/") for key in KEYS}

    def test_only_optimizers_that_were_measured_have_a_figure(self, monkeypatch):
        log, measurements, trainer, _ = self.log()
        figures, charts = [], []
        where = "lightning_wn.callbacks.noise_scale.log"
        monkeypatch.setattr(f"{where}.log_figure_to", lambda loggers, name, figure, step: figures.append((name, step)))
        monkeypatch.setattr(f"{where}.add_margin_chart", lambda loggers, prefixes: charts.extend(prefixes))
        self.go_to(trainer, log, 5)
        log.write_figures(trainer)
        assert (figures, charts) == ([], ["gns"])
        self.measure(measurements)
        log.write_figures(trainer)
        assert figures == [("gns/figure", 5)]

    def test_nothing_measured_is_said(self):
        log, measurements, _, _ = self.log()
        with pytest.warns(UserWarning, match="measured nothing: no optimizer step came by it; in manual"):
            log.say_result()
        self.measure(measurements)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log.say_result()


class TestLogging:
    def test_all_keys_at_log_steps_to_all_loggers(self, tmp_path):
        loggers = [ListLogger(), ListLogger(), CSVLogger(tmp_path)]
        callback, trainer = measure(
            DigitsMLP(), loader(digits()), steps=25, trainer_args={"logger": loggers, "log_every_n_steps": 10}
        )
        for logger in loggers[:2]:
            rows = [(step, row) for step, row in logger.rows if "gns/noise_scale" in row]
            # Lightning counts the logged steps from 0; the last is the end of training
            assert [step for step, _ in rows] == [9, 19, 24]
            assert all(set(row) - {"epoch"} == KEYS for _, row in rows)
        estimate = callback.estimate()
        last = rows[-1][1]
        assert last["gns/noise_scale"] == estimate.noise_scale
        assert last["gns/noise_scale_lower"] == estimate.lower
        assert last["gns/noise_scale_upper"] == estimate.upper
        assert last["gns/grad_sq_norm"] == estimate.grad_sq_norm
        assert last["gns/cov_trace"] == estimate.cov_trace
        assert last["gns/batch_size"] == 128
        assert last["gns/suggested_batch_size"] == callback.advise().suggested_batch_size
        assert float(trainer.callback_metrics["gns/noise_scale"]) == pytest.approx(estimate.noise_scale)
        assert "gns/noise_scale" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()

    def test_two_instances_with_prefixes(self):
        logger = ListLogger()
        other = GradientNoiseScaleCallback(every_n_steps=5, prefix="gns5")
        measure(DigitsMLP(), loader(digits()), steps=10, callbacks=[other], trainer_args={"logger": logger})
        logged = {key for _, row in logger.rows for key in row}
        assert logged >= KEYS
        assert {key.replace("gns", "gns5", 1) for key in KEYS} <= logged

    def test_monitored_by_other_callbacks(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, monitor="gns/noise_scale", save_on_train_epoch_end=True)
        settings = {"enable_checkpointing": True, "log_every_n_steps": 5}
        measure(DigitsMLP(), loader(digits()), steps=30, callbacks=[checkpoint], trainer_args=settings)
        assert checkpoint.best_model_score is not None

    def test_synchronises_now_and_then_without_logging(self):
        """Otherwise the buffer would grow until the end of training."""
        seen = []

        class Watch(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                seen.append(trainer.callbacks[0].estimate().num_measurements)

        settings = {"log_every_n_steps": 0}
        measure(DigitsMLP(), loader(digits()), accumulate=2, steps=101, callbacks=[Watch()], trainer_args=settings)
        assert sorted(set(seen)) == [0, 50, 100]

    def test_without_a_logger(self):
        callback, _ = measure(DigitsMLP(), loader(digits()), steps=10, trainer_args={"log_every_n_steps": 0})
        assert callback.estimate().num_measurements == 10

    def test_barebones(self):
        callback = GradientNoiseScaleCallback(every_n_steps=1)
        trainer = L.Trainer(
            barebones=True, max_steps=10, accumulate_grad_batches=2, callbacks=[callback], accelerator="cpu"
        )
        trainer.fit(DigitsMLP(), loader(digits()))
        assert callback.estimate().num_measurements == 10

    def test_a_few_lines_once_at_the_end(self, monkeypatch):
        said = []
        # how often a logger's handlers see it depends on which loggers other tests have opened
        monkeypatch.setattr("lightning_wn.callbacks.noise_scale.log.rank_zero_info", said.append)
        callback, _ = measure(DigitsMLP(), loader(digits()), steps=20)
        (summary,) = [message for message in said if "noise scale" in message]
        estimate, advice = callback.estimate(), callback.advise()
        measured, suggestion, rest = summary.strip().splitlines()
        assert measured == f"Gradient {estimate}, by the probe 'micro_batch' on every optimizer step."
        assert suggestion == advice.suggestion
        assert suggestion in str(advice)
        assert "`print(callback.advise())` says more" in rest
        assert rest.endswith("and 1 reason for doubt.")
        assert len(advice.doubts) == 1


def test_plots_what_was_logged_and_what_a_resumed_run_logs(tmp_path):
    callback = GradientNoiseScaleCallback(every_n_steps=1)
    settings = QUIET | {"max_steps": 60, "accumulate_grad_batches": 4, "log_every_n_steps": 10}
    trainer = L.Trainer(callbacks=[callback], **settings)
    trainer.fit(DigitsMLP(), loader(digits(512), 16))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    series = callback.plot().axes[0].get_lines()[0]
    assert list(series.get_xdata()) == [9, 19, 29, 39, 49, 59]
    assert series.get_ydata()[-1] == callback.estimate().noise_scale
    later = GradientNoiseScaleCallback(every_n_steps=1)
    trainer = L.Trainer(callbacks=[later], **(settings | {"max_steps": 80}))
    trainer.fit(DigitsMLP(), loader(digits(512), 16), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert list(later.plot().axes[0].get_lines()[0].get_xdata()) == [9, 19, 29, 39, 49, 59, 69, 79]


def test_logs_the_picture_when_asked(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for asked in (True, False):
        logger = TensorBoardLogger(tmp_path, name=str(asked))
        callback = GradientNoiseScaleCallback(every_n_steps=1, log_figure=asked)
        settings = {"max_steps": 20, "accumulate_grad_batches": 4, "log_every_n_steps": 10, "logger": logger}
        L.Trainer(callbacks=[callback], **(QUIET | settings)).fit(DigitsMLP(), loader(digits(512), 16))
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        found[asked] = events.Tags()["images"]
        assert ("custom_scalars__config__" in events.Tags()["tensors"]) is asked
    assert found == {True: ["gns/figure"], False: []}
