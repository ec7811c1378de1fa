"""The Lightning callback: wires a probe to the metric and the metric to the logger."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_wn.arguments import check_confidence
from lightning_wn.batch_size.advice import BatchSizeAdvice, RunConfiguration, advise_batch_size
from lightning_wn.callbacks.noise_scale.arguments import DEFAULT_EMA_DECAY, check_cadence, check_choice
from lightning_wn.callbacks.noise_scale.curvature_measurement import CURVATURE, CurvatureMeasurement
from lightning_wn.callbacks.noise_scale.measurements import (
    ResultsByMail,
    measurement_state,
    metric_state,
    restore_measurement,
    restore_metric,
)
from lightning_wn.callbacks.noise_scale.optimizer_measurement import OptimizerMeasurement, ParameterChoice
from lightning_wn.callbacks.noise_scale.run_watch import RunWatch
from lightning_wn.callbacks.noise_scale.summary import WARNINGS, fit_summary
from lightning_wn.module_selectors import ModuleSelector
from lightning_wn.noise_scale.batch_counting import BatchSizeFn, count_examples
from lightning_wn.noise_scale.drawing import import_pyplot
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.metric import GradientNoiseScale, synchronize_together
from lightning_wn.noise_scale.samples import Rejection
from lightning_wn.probes.choice import PROBES, choose_probe
from lightning_wn.probes.micro_batch import MicroBatchProbe
from lightning_wn.probes.requirements import require_dense_gradients
from lightning_wn.reports.logged_history import LoggedHistory
from lightning_wn.reports.loggers import add_margin_chart, log_figure_to
from lightning_wn.trainer import (
    first_accumulation,
    is_log_step,
    log_interval,
    log_metrics,
    require_lightning_trainer,
    step_to_log,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GradientNoiseScaleCallback(Callback):
    r"""Measures the gradient noise scale while a model trains, logs it, and suggests a batch size.

    The simple noise scale B_simple = tr(Σ)/\|G\|² predicts the critical batch size: far below it, doubling
    the batch size halves the steps; far above it, doubling it only costs examples (McCandlish et al., *An
    Empirical Model of Large-Batch Training*, arXiv 1812.06162). It is estimated from the gradients of
    single micro-batches beside the accumulated, rank-averaged gradient that the optimizer uses anyway.
    Training itself is unchanged, bit for bit.

    At every log step (``Trainer(log_every_n_steps=...)``) these keys go to all loggers and into
    ``trainer.callback_metrics``:

    - ``gns/noise_scale``: B_simple, in ``unit``; infinite while \|G\|² is not above zero
    - ``gns/noise_scale_lower``, ``gns/noise_scale_upper``: its confidence interval, in ``unit``
    - ``gns/grad_sq_norm``: \|G\|², in (loss / parameter)²
    - ``gns/cov_trace``: tr(Σ), in (loss / parameter)² · ``unit``
    - ``gns/batch_size``: the batch size in use, in ``unit``
    - ``gns/suggested_batch_size``: reachable batch size nearest to the noise scale, in ``unit``
    - ``gns/coverage``: measured share of the trainable parameters, only where below 1

    What is measured for a group or for one of several optimizers has its name in between, as in
    ``gns/attention/noise_scale`` or ``gns/optimizer_1/noise_scale``.

    In manual optimization the batch size is that of the batch, and the losses that go into one optimizer step are
    taken to add up to the mean loss. One device measures there by ``consecutive`` where there are several optimizers,
    and by ``micro_batch`` where you accumulate yourself and say so.

    Args:
        probe: Where gradient samples come from. ``"micro_batch"``: each rank's each micro-batch; needs gradient
            accumulation, DDP, or both. ``"sharded"``: the same under ModelParallelStrategy with FSDP2.
            ``"per_example"``: each example of a batch, on one device, for layers that do not mix examples.
            ``"consecutive"``: each optimizer step beside the last one, on one device; approximate, and far off
            at large learning rates. ``"auto"`` takes ``sharded`` under ModelParallelStrategy, ``micro_batch``
            where a step has two micro-batches or more, ``per_example`` otherwise, and ``consecutive`` for
            models with BatchNorm or under torch.compile.
        every_n_steps: Measure one in so many optimizer steps. None is a fixed number per probe (10, and 100 for
            ``per_example``) at which measuring adds about 1 % to training time or less; a resumed run keeps the
            number that its checkpoint was written with.
        ema_decay: Weight of the past per measurement, in [0, 1]; 1 is the plain mean of all.
        half_life_steps: The same in optimizer steps: after so many, a measurement counts half.
        confidence: Level of the interval, in (0, 1).
        batch_size_fn: From a batch to the number of examples (or tokens) that the loss is a mean over. By
            default the common first dimension of the batch's tensors. A tensor result stays on its device.
        unit: The name of what is counted.
        prefix: Start of the logged keys; two instances in one Trainer need different ones.
        layers: Measure only these parameters: a glob on qualified names of modules or parameters, a module type, a
            predicate ``(name, module) -> bool``, or a list of these. The coverage in the estimate says so. None is all.
        groups: Named sets of parameters, each said as in ``layers``, that get an estimate of their own beside the
            total, from the same measurement: ``{"attention": "*.attn", "mlp": ["*.fc1", "*.fc2"]}``.
        preconditioned: Measure, beside the plain gradient, the one that an Adam-like optimizer divides by its
            √v̂ + ε; logged under ``preconditioned/``. Costs a few more passes over the gradients.
        curvature_every_n_steps: Measure, every so many optimizer steps, the curvature-weighted noise scale
            B_noise = tr(HΣ)/(GᵀHG) by Hessian-vector products on a copy of the model; logged under ``curvature/``.
            One measurement costs about as much as 15 micro-batches. None does not measure it.
        log_figure: Log the picture of :meth:`plot` to TensorBoard, W&B and MLflow at the end of a fit, and give
            TensorBoard a chart of the noise scale with its interval. Needs matplotlib.

    Raises:
        ValueError: For arguments out of range, and before training starts for what cannot be measured:
            a strategy other than single-device, DDP and FSDP2, SyncBatchNorm, sparse gradients, no trainable
            parameters. At the first measured batch, if the number of examples cannot be inferred.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = GradientNoiseScaleCallback(every_n_steps=1)
        >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=[callback], logger=False,
        ...                   enable_checkpointing=False)
        >>> # trainer.fit(model, data); print(callback.advise())
        >>> callback.estimate().num_measurements
        0
    """

    def __init__(
        self,
        probe: Literal["auto", "micro_batch", "sharded", "per_example", "consecutive"] = "auto",
        *,
        every_n_steps: int | None = None,
        ema_decay: float = DEFAULT_EMA_DECAY,
        half_life_steps: float | None = None,
        confidence: float = 0.95,
        batch_size_fn: BatchSizeFn | None = None,
        unit: str = "examples",
        prefix: str = "gns",
        layers: Sequence[ModuleSelector] | ModuleSelector | None = None,
        groups: dict[str, Sequence[ModuleSelector] | ModuleSelector] | None = None,
        preconditioned: bool = False,
        curvature_every_n_steps: int | None = None,
        log_figure: bool = False,
    ) -> None:
        super().__init__()
        check_cadence(probe, every_n_steps, ema_decay, half_life_steps)
        check_choice(layers, groups, curvature_every_n_steps)
        check_confidence(confidence)
        self.probe = probe
        self.every_n_steps = every_n_steps
        self.ema_decay = ema_decay
        self.half_life_steps = half_life_steps
        self.confidence = confidence
        self.batch_size_fn = batch_size_fn
        self.unit = unit
        self.prefix = prefix
        self.layers = layers
        self.groups = groups
        self.preconditioned = preconditioned
        self.curvature_every_n_steps = curvature_every_n_steps
        self.log_figure = log_figure
        self._choice = ParameterChoice(layers=layers, groups=dict(groups or {}), preconditioned=preconditioned)
        self._mail = ResultsByMail(self._choice)
        self._trainer: Trainer | None = None
        self._restored_every_n_steps: int | None
        self._restored_probe: str | None
        self._restores = True
        self._fitting = False
        self._measurements: list[OptimizerMeasurement]
        self._start_afresh()

    # ------------------------------------------------------------------ what users ask

    def estimate(self, optimizer: int | None = None, group: str | None = None) -> NoiseScaleEstimate:
        """Return an estimate as of the last synchronisation (log step, checkpoint, end of training).

        The same on every rank. Never communicates, so it may be called on one rank alone.

        Args:
            optimizer: Position among the LightningModule's optimizers; None is the only one.
            group: A name in ``groups``, ``"preconditioned"`` or ``"curvature"`` where they are measured; None is
                the simple noise scale of all measured parameters.

        Raises:
            ValueError: If there is no such optimizer or group, or several optimizers and none is named.
        """
        self._collect_mail()
        measurement = self._measurements[self._index_of(optimizer)]
        if group == CURVATURE and self._curvature is not None:
            return self._curvature.estimate()
        names = self._groups
        if group is not None and group not in names:
            raise ValueError(f"`group` must be None or one of {list(names)}, got {group!r}; None is the total.")
        return measurement.estimate(group)

    def estimates(self) -> dict[str, NoiseScaleEstimate]:
        """Return all estimates, by what stands between ``prefix`` and the last part of their logged keys.

        ``"total"`` is that of all measured parameters. With several optimizers each name starts with
        ``"optimizer_0/"`` and so on.
        """
        self._collect_mail()
        found = {}
        for index in range(len(self._measurements)):
            start = self._start_of_key(index)
            for group in (None, *self._groups):
                found[start + (group or "total")] = self.estimate(index, group)
        return found

    def advise(
        self, optimizer: int | None = None, *, target: float = 1.0, price_per_device_hour: float | None = None
    ) -> BatchSizeAdvice:
        """Return a batch size to try, with what it would change; as of the last synchronisation.

        The numbers are the same on every rank, except for the times, which are each rank's own.

        Args:
            optimizer: Position among the LightningModule's optimizers; None is the only one.
            target: The wished batch size over the noise scale: 1 costs twice the fewest examples, 0.1 costs 10 % more
                than the fewest.
            price_per_device_hour: In any currency, for what other batch sizes would cost.

        Raises:
            ValueError: If there are several optimizers and none is named, or a number is not positive.
        """
        estimate = self.estimate(optimizer)
        # of the step that the batch size is of, whatever the Trainer's factor has become since
        index = self._index_of(optimizer)
        measurement = self._measurements[index]
        micro_batches, ranks = measurement.metric.micro_batches_and_ranks
        run = RunConfiguration(accumulate_grad_batches=micro_batches // ranks, num_ranks=ranks) if ranks else None
        return advise_batch_size(
            estimate,
            run or RunConfiguration(),
            self._watch.observed(
                index, every_n_steps=measurement.every_n_steps, ema_decay=measurement.metric.ema_decay
            ),
            target=target,
            price_per_device_hour=price_per_device_hour,
        )

    def plot(
        self, optimizer: int | None = None, *, target: float = 1.0, theme: Literal["light", "dark"] = "light"
    ) -> Figure:
        """Draw what was measured and what it advises, in four panels; see :func:`~.run_plots.plot_run`.

        Args:
            optimizer: Position among the LightningModule's optimizers; None is the only one.
            target: As in :meth:`advise`.
            theme: ``"dark"`` is for a dark page; ``"light"`` takes matplotlib's own settings.

        Returns:
            A matplotlib figure; ``figure.savefig("noise_scale.png")`` writes it.

        Raises:
            ModuleNotFoundError: If matplotlib is missing; ``pip install "lightning-wn[plots]"`` brings it.
            ValueError: If nothing was measured yet, or as in :meth:`advise`.
        """
        from lightning_wn.reports.run_figure import plot_run  # noqa: PLC0415 - matplotlib is optional

        advice = self.advise(optimizer, target=target)
        start = self._prefix_of(self._index_of(optimizer))
        return plot_run(self._history.of(start, advice.estimate), advice, prefix=start, theme=theme)

    def reset(self) -> None:
        """Forget all measurements, for instance after a change of the learning rate; on every rank."""
        self._mail.collect()
        for metric in self._metrics:
            metric.reset()
        self._last_logged_step = -1

    # ------------------------------------------------------------------ what other callbacks ask and say

    @property
    def micro_batch_size(self) -> float:
        """Size of one micro-batch of all ranks together, in ``unit``; NaN before the first measurement.

        Of the last full optimizer step that was measured, as of the last synchronisation.
        """
        self._collect_mail()
        metric = self._measurements[0].metric
        micro_batches, ranks = metric.micro_batches_and_ranks
        return metric.estimate().batch_size * ranks / micro_batches if micro_batches else math.nan

    def gradients_were_scaled(self, factor: float) -> None:
        """Say that the gradients of the step under way were multiplied by a factor, in ``on_before_optimizer_step``.

        A callback that does so and stands before this one in the Trainer's list would otherwise look like an error
        in the gradients. If this callback has read them already, the word changes nothing.
        """
        for measurement in self._measurements:
            measurement.gradient_factor = factor

    # ------------------------------------------------------------------ life cycle

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint, one for each prefix and probe."""
        return self._generate_state_key(prefix=self.prefix, probe=self.probe)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what is known before training, and start afresh."""
        # `test(ckpt_path="best")` after a fit must not put an earlier estimate in the place of the last one
        self._restores = stage == "fit" or not self._has_measured()
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        require_lightning_trainer(trainer, type(self).__name__)
        if self.log_figure:
            import_pyplot()  # not only at the end that matplotlib is missing
        # Lightning restores the state after this hook
        self._start_afresh()
        self._accumulation = first_accumulation(trainer)
        self._choose_probe(trainer, pl_module, wrapped=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is known once the model is wrapped and the optimizer exists."""
        # a restored state may have brought some already
        for _ in trainer.optimizers[len(self._measurements) :]:
            self._measurements.append(self._new_measurement())
        for measurement, optimizer in zip(self._measurements, trainer.optimizers, strict=False):
            measurement.attach(optimizer, pl_module, alone=len(trainer.optimizers) == 1)
        # layers that setup or configure_model built were not there before
        self._choose_probe(trainer, pl_module, wrapped=True)
        if self._curvature is not None:
            self._curvature.require_measurable(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle what depends on the run; a checkpoint has been restored by now under every strategy."""
        self._trainer = trainer
        self._watch.start(trainer, pl_module)
        # a checkpoint of a run with more optimizers is none of this one's
        del self._measurements[max(len(trainer.optimizers), 1) :]
        if self._restored_probe is None:
            self._settle_probe()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a window where Lightning zeroes the gradients, and count the micro-batch."""
        self._watch.start_batch(trainer, batch_idx)
        self._stepped = False
        if self._restored_probe is not None:
            self._go_on_from_checkpoint(trainer, pl_module, self._restored_probe)
        elif trainer.accumulate_grad_batches != self._accumulation and batch_idx % trainer.accumulate_grad_batches == 0:
            self._choose_probe_anew(trainer, pl_module)
        if self._curvature is not None:
            # before the probe watches the forward pass: the copy of the model has its hooks, too
            self._curvature.see_batch(trainer, pl_module, batch, batch_idx, self.batch_size_fn)
        measuring = False
        for measurement in self._measurements:
            measurement.start_batch(trainer, pl_module, batch_idx)
            measuring |= measurement.measuring
        self._watch.note_measuring(measuring)
        # in manual optimization a step may begin at any backward pass
        if measuring or not pl_module.automatic_optimization:
            count = count_examples(batch, self.batch_size_fn)
            for measurement in self._measurements:
                measurement.before_forward(count)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the probe record this backward pass."""
        for measurement in self._measurements:
            measurement.before_backward(loss, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the micro-batch's gradient sample."""
        for measurement in self._measurements:
            measurement.after_backward(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read the optimizer's gradient, before clipping, and hand the step to the metric."""
        self._watch.before_step()
        self._stepped = True
        for measurement, own in zip(self._measurements, trainer.optimizers, strict=False):
            if own is optimizer:
                measurement.before_step(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Synchronise and log at log steps."""
        if not self._stepped:
            return
        self._watch.after_step(trainer)
        self._step_to_log = step_to_log(trainer)
        if is_log_step(trainer):
            self._synchronize(trainer)
            if log_interval(trainer):
                self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the run's times."""
        self._watch.interrupt()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave what lies between two epochs out of the run's times."""
        self._watch.interrupt()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Synchronise, log and print the last estimate, and leave no hook behind."""
        self._detach()
        self._watch.end(trainer)
        self._synchronize(trainer)
        if log_interval(trainer):
            self._log(trainer)
        if self.log_figure and trainer.is_global_zero:
            self._log_figures(trainer)
        if trainer.local_rank == 0:
            self._mail.post(self._measurements, self._metrics)
        for index, measurement in enumerate(self._measurements):
            summary = fit_summary(
                measurement.estimate(),
                self.advise(index),
                measurement.metric.rejected,
                measurement.every_n_steps,
                optimizer=index if len(self._measurements) > 1 else None,
                others={group: self.estimate(index, group) for group in self._groups},
            )
            rank_zero_info(f"\n{summary}")
        if not self._has_measured():
            rank_zero_warn(
                "`GradientNoiseScaleCallback` measured nothing: no optimizer step that it looked at had two usable "
                "gradient samples; train for more steps, lower `every_n_steps`, or let an epoch have at least two "
                "batches per optimizer step."
            )
        self._trainer = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and on one device keep what was measured since the last synchronisation."""
        # Lightning calls the callbacks that save checkpoints after this one
        if self._trainer is not None and trainer.world_size == 1:
            with contextlib.suppress(RuntimeError):  # a broken device; its own error must come through
                self._synchronize(trainer)
        self._detach()
        self._trainer = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        self._trainer = None

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives; synchronises first unless the run was interrupted."""
        self._collect_mail()
        trainer = self._trainer
        if trainer is not None:
            # after an exception a rank may be gone, and waiting for it would lose the checkpoint
            interrupted = trainer.state.status == TrainerStatus.INTERRUPTED
            if not interrupted or trainer.world_size == 1:
                self._synchronize(trainer)
        return {
            "every_n_steps": self._measurements[0].every_n_steps,
            "probe": self._probe_name,
            "optimizers": [measurement_state(measurement) for measurement in self._measurements],
            "history": self._history.state_dict(),
            "curvature": None if self._curvature is None else metric_state(self._curvature.metric, (CURVATURE,)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, except where a model is only evaluated after this callback measured.

        What the checkpoint knows of groups that are not measured any more is left out; new groups start afresh.
        """
        if not self._restores:
            return
        saved = state_dict["optimizers"]
        self._history.load_state_dict(state_dict.get("history", {}))
        self._restored_probe = state_dict["probe"]
        if not self._fitting:
            # what was measured, and by what; a fit finds out for itself
            self._probe_name = state_dict["probe"]
            self._measurements = []
        for _ in saved[len(self._measurements) :]:
            self._measurements.append(self._new_measurement())
        for measurement, state in zip(self._measurements, saved, strict=False):
            restore_measurement(measurement, state, with_coverage=not self._fitting)
        if self._curvature is not None and state_dict["curvature"] is not None:
            restore_metric(self._curvature.metric, (CURVATURE,), state_dict["curvature"])
        self._restored_every_n_steps = state_dict["every_n_steps"]

    # ------------------------------------------------------------------ inside

    @property
    def _groups(self) -> tuple[str, ...]:
        """What is measured beside the total."""
        return (*self._choice.names, *([CURVATURE] if self._curvature is not None else []))

    @property
    def _metrics(self) -> list[GradientNoiseScale]:
        own = [self._curvature.metric] if self._curvature is not None else []
        return [measurement.metric for measurement in self._measurements] + own

    def _start_afresh(self) -> None:
        self._mail.collect()
        self._watch = RunWatch()
        self._history = LoggedHistory()
        self._curvature = None
        if self.curvature_every_n_steps is not None:
            metric = GradientNoiseScale(ema_decay=self.ema_decay, confidence=self.confidence, unit=self.unit)
            self._curvature = CurvatureMeasurement(self.curvature_every_n_steps, metric)
        self._probe_name = MicroBatchProbe.name if self.probe == "auto" else self.probe
        self._measurements = [self._new_measurement()]
        self._accumulation = 1
        self._restored_every_n_steps = None
        self._restored_probe = None
        self._stepped = False
        self._step_to_log = -1
        self._last_logged_step = -1
        self._warned: set[Rejection] = set()

    def _new_measurement(self) -> OptimizerMeasurement:
        metric = GradientNoiseScale(
            ema_decay=self.ema_decay, confidence=self.confidence, unit=self.unit, groups=self._choice.names
        )
        measurement = OptimizerMeasurement(self._choice, metric, PROBES[self._probe_name]())
        measurement.every_n_steps = self.every_n_steps or measurement.every_n_steps
        return measurement

    def _index_of(self, optimizer: int | None) -> int:
        count = len(self._measurements)
        if optimizer is None and count > 1:
            raise ValueError(
                f"`optimizer` must be named where there are several, each with a noise scale of its own; give one of "
                f"{list(range(count))}, or use `estimates()` for all."
            )
        index = optimizer or 0
        if not 0 <= index < count:
            raise ValueError(f"`optimizer` must be None or one of {list(range(count))}, got {optimizer!r}.")
        return index

    def _start_of_key(self, optimizer: int) -> str:
        return f"optimizer_{optimizer}/" if len(self._measurements) > 1 else ""

    def _prefix_of(self, optimizer: int) -> str:
        return f"{self.prefix}/{self._start_of_key(optimizer)}".rstrip("/")

    def _has_measured(self) -> bool:
        self._collect_mail()
        return any(measurement.metric.num_measurements for measurement in self._measurements)

    def _choose_probe(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        require_dense_gradients(pl_module)
        self._probe_name = choose_probe(self.probe, trainer, pl_module, self._accumulation)
        for measurement in self._measurements:
            if self._probe_name != measurement.probe.name:
                measurement.take_probe(PROBES[self._probe_name]())
            if self.preconditioned and not measurement.probe.can_precondition:
                raise ValueError(
                    f"`preconditioned=True` needs the whole denominator of the optimizer, and the probe "
                    f"{self._probe_name!r} sees one shard of it on each rank; use DDP, or `preconditioned=False`."
                )
            measurement.probe.require_readable(trainer, pl_module, wrapped=wrapped)

    def _go_on_from_checkpoint(self, trainer: Trainer, pl_module: LightningModule, before: str) -> None:
        """Take the probe that fits how a resumed run goes on, once all callbacks have settled that."""
        self._restored_probe = None
        if trainer.accumulate_grad_batches != self._accumulation:
            self._accumulation = trainer.accumulate_grad_batches
            self._choose_probe(trainer, pl_module, wrapped=True)
        if before != self._probe_name:
            self._restored_every_n_steps = None
            self._keep_what_fits(before)
        self._settle_probe()

    def _choose_probe_anew(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow a change of the accumulation factor, on every rank alike."""
        self._accumulation = trainer.accumulate_grad_batches
        name = choose_probe(self.probe, trainer, pl_module, self._accumulation)
        if name == self._probe_name:
            return
        before, self._probe_name = self._probe_name, name
        self._keep_what_fits(before)
        for measurement in self._measurements:
            probe = PROBES[name]()
            # training has gone on for a while: it must not stop for a measurement
            probe.strict = False
            measurement.take_probe(probe)
        self._settle_probe()

    def _keep_what_fits(self, before: str) -> None:
        """Forget what another probe measured if only one of the two is exact: one estimate is either exact or not."""
        if bool(PROBES[before].approximate) != bool(PROBES[self._probe_name].approximate):
            for measurement in self._measurements:
                measurement.metric.reset()

    def _settle_probe(self) -> None:
        """Set what depends on the probe, and say it where that is approximate."""
        for measurement in self._measurements:
            probe = measurement.probe
            every_n_steps = self.every_n_steps or self._restored_every_n_steps or probe.default_every_n_steps
            measurement.every_n_steps = every_n_steps
            if self.half_life_steps is not None:
                measurement.metric.ema_decay = 0.5 ** (every_n_steps / self.half_life_steps)
            low_precision = any(p.dtype in (torch.float16, torch.bfloat16) for p in measurement.parameters)
            # 16-bit gradients are rounded while they accumulate: 8 bits of mantissa, a few additions
            rounded = low_precision or probe.reduces_in_low_precision
            measurement.metric.checksum_tolerance = 0.05 if rounded else 0.01
        # the number belongs to the probe that it was chosen for
        self._restored_every_n_steps = None
        probe = self._measurements[0].probe
        if probe.approximate:
            rank_zero_warn(
                f"`GradientNoiseScaleCallback` measures with the probe '{probe.name}', which is approximate: "
                f"{probe.approximate}."
            )

    def _detach(self) -> None:
        for measurement in self._measurements:
            measurement.detach()
        if self._curvature is not None:
            self._curvature.forget_batches()

    def _synchronize(self, trainer: Trainer) -> None:
        before = [metric.rejected for metric in self._metrics]
        synchronize_together(self._metrics, across_ranks=trainer.world_size > 1)
        for metric, counts in zip(self._metrics, before, strict=True):
            for reason, count in metric.rejected.items():
                if count > counts[reason] and reason in WARNINGS and reason not in self._warned:
                    self._warned.add(reason)
                    rank_zero_warn(f"`GradientNoiseScaleCallback`: {WARNINGS[reason]}")

    def _log(self, trainer: Trainer) -> None:
        if self._step_to_log == self._last_logged_step:
            return
        values: dict[str, float] = {}
        for index in range(len(self._measurements)):
            for group in (None, *self._groups):
                estimate = self.estimate(index, group)
                if not estimate.num_measurements:
                    continue
                start = f"{self.prefix}/{self._start_of_key(index)}{group + '/' if group else ''}"
                metrics = estimate.to_metrics()
                if group is None:
                    metrics["suggested_batch_size"] = self.advise(index).suggested_batch_size
                if estimate.coverage < 1.0:
                    metrics["coverage"] = estimate.coverage
                values |= {start + key: value for key, value in metrics.items()}
        if not values:
            return
        self._last_logged_step = self._step_to_log
        self._history.append(self._step_to_log, values)
        log_metrics(trainer, values, self._step_to_log)

    def _log_figures(self, trainer: Trainer) -> None:
        for index, measurement in enumerate(self._measurements):
            if measurement.metric.num_measurements:
                name = f"{self._prefix_of(index)}/figure"
                log_figure_to(trainer.loggers, name, self.plot(index), step=self._step_to_log)
        add_margin_chart(trainer.loggers, [self._prefix_of(index) for index in range(len(self._measurements))])

    def _collect_mail(self) -> None:
        """Take over the result of a fit that ran in a spawned or forked process."""
        letter = self._mail.collect()
        if letter is None:
            return
        self._probe_name = letter.probe
        self._measurements = [self._new_measurement() for _ in range(letter.num_optimizers)]
        letter.fill(self._measurements, self._metrics)
