"""What is logged of the estimates: the keys at log steps, the figures and the few lines at the end of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_wn.batch_size.advice import BatchSizeAdvice
from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.callbacks.noise_scale.nothing_measured import why_nothing
from lightning_wn.callbacks.noise_scale.run_watch import RunWatch
from lightning_wn.callbacks.noise_scale.summary import fit_summary
from lightning_wn.reports.logged_history import LoggedHistory
from lightning_wn.reports.loggers import add_margin_chart, log_figure_to
from lightning_wn.trainer import log_interval, log_metrics, step_to_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NoiseScaleLog:
    """Writes a run's estimates, each step's once, as of their last synchronisation.

    Args:
        prefix: Start of all keys.
        measurements: Hold the estimates.
        watch: What advice needs of the run.
    """

    def __init__(self, prefix: str, measurements: Measurements, watch: RunWatch) -> None:
        self.history = LoggedHistory()
        self._prefix = prefix
        self._measurements = measurements
        self._watch = watch
        self._step = -1
        self._last_written = -1

    def note_step(self, trainer: Trainer) -> None:
        """Take the step that Lightning writes beside its own metrics of this batch, which ended an optimizer step."""
        self._step = step_to_log(trainer)

    def write(self, trainer: Trainer) -> None:
        """Hand what has been measured to all loggers, unless the step has been written or nothing is to be logged."""
        if not log_interval(trainer) or self._step == self._last_written:
            return
        values: dict[str, float] = {}
        for index in range(len(self._measurements)):
            for group in (None, *self._measurements.names):
                estimate = self._measurements.estimate(index, group)
                if not estimate.num_measurements:
                    continue
                metrics = estimate.to_metrics()
                if group is None:
                    metrics["suggested_batch_size"] = self._advise(index).suggested_batch_size
                if estimate.coverage < 1.0:
                    metrics["coverage"] = estimate.coverage
                start = f"{self._prefix}/{self._measurements.start_of_key(index)}{group + '/' if group else ''}"
                values |= {start + key: value for key, value in metrics.items()}
        if values:
            self._last_written = self._step
            self.history.append(self._step, values)
            log_metrics(trainer, values, self._step)

    def plot(self, index: int, advice: BatchSizeAdvice, theme: Literal["light", "dark"] = "light") -> Figure:
        """Draw what was logged of one optimizer, and what it advises; see :func:`~.run_figure.plot_run`."""
        from lightning_wn.reports.run_figure import plot_run  # noqa: PLC0415 - matplotlib is optional

        prefix = self._prefix_of(index)
        return plot_run(self.history.of(prefix, advice.estimate), advice, prefix=prefix, theme=theme)

    def write_figures(self, trainer: Trainer) -> None:
        """Log the picture of each optimizer that was measured, and give TensorBoard a chart of its interval."""
        prefixes = [self._prefix_of(index) for index in range(len(self._measurements))]
        for index, prefix in enumerate(prefixes):
            if self._measurements[index].metric.num_measurements:
                figure = self.plot(index, self._advise(index))
                log_figure_to(trainer.loggers, f"{prefix}/figure", figure, step=self._step)
        add_margin_chart(trainer.loggers, prefixes)

    def say_result(self) -> None:
        """Say at the end of a fit what was measured and what to try, or that nothing was."""
        for index, measurement in enumerate(self._measurements):
            summary = fit_summary(
                self._advise(index),
                measurement.metric.rejected,
                measurement.every_n_steps,
                unread=measurement.probe.num_left_out,
                optimizer=index if len(self._measurements) > 1 else None,
                others={group: self._measurements.estimate(index, group) for group in self._measurements.names},
            )
            rank_zero_info(f"\n{summary}")
        if not self._measurements.has_measured:
            rank_zero_warn(f"`GradientNoiseScaleCallback` measured nothing: {why_nothing(self._measurements)}")

    def _advise(self, index: int) -> BatchSizeAdvice:
        return self._watch.advise(self._measurements[index], index)

    def _prefix_of(self, index: int) -> str:
        return f"{self._prefix}/{self._measurements.start_of_key(index)}".rstrip("/")
