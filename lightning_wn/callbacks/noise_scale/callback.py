"""The Lightning callback: what users ask it, and at which hook of a run each of its parts has its turn."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.optim import Optimizer

from lightning_wn.arguments import check_confidence
from lightning_wn.callbacks.noise_scale.arguments import (
    DEFAULT_EMA_DECAY,
    check_batch_dims,
    check_cadence,
    check_choice,
)
from lightning_wn.callbacks.noise_scale.independence_check import SHARED_ROWS
from lightning_wn.callbacks.noise_scale.log import NoiseScaleLog
from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.callbacks.noise_scale.optimizer_measurement import ParameterChoice
from lightning_wn.callbacks.noise_scale.probe_choice import ProbeChoice
from lightning_wn.callbacks.noise_scale.results import NoiseScaleResults
from lightning_wn.callbacks.noise_scale.run_watch import RunWatch
from lightning_wn.callbacks.worker_results import WorkerResults
from lightning_wn.module_selectors import ModuleSelector
from lightning_wn.noise_scale.batch_counting import BatchSizeFn
from lightning_wn.noise_scale.drawing import import_pyplot
from lightning_wn.trainer import is_log_step, require_lightning_trainer

if TYPE_CHECKING:
    pass


class GradientNoiseScaleCallback(NoiseScaleResults, Callback):
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
    taken to add up to the mean loss. One device measures there by ``batch_pair`` where there are several optimizers,
    and by ``micro_batch`` where you accumulate yourself and say so.

    Args:
        probe: Where gradient samples come from. ``"micro_batch"``: each rank's each micro-batch; needs gradient
            accumulation, DDP, or both. ``"sharded"``: the same under ModelParallelStrategy with FSDP2.
            ``"per_example"``: each example of a batch, on one device, for layers that do not mix examples.
            ``"batch_pair"``: the next batch at the same weights, too, on one device, for any model that can be
            copied. ``"loss_terms"``: each term of the loss, where one batch holds all data, as a whole graph does.
            ``"consecutive"``: each optimizer step beside the last one, on one device; approximate, and far
            off at large learning rates. ``"auto"`` takes ``sharded`` under ModelParallelStrategy, ``micro_batch``
            where a step has two micro-batches or more, ``per_example`` otherwise, and ``batch_pair`` for
            models with BatchNorm, under torch.compile, and for several optimizers.
        every_n_steps: Measure one in so many optimizer steps. None is a fixed number per probe (10, and 100 for
            ``per_example`` and ``batch_pair``) at which measuring adds about 1 % to training time or less; a resumed
            run keeps the number that its checkpoint was written with.
        ema_decay: Weight of the past per measurement, in [0, 1]; 1 is the plain mean of all.
        half_life_steps: The same in optimizer steps: after so many, a measurement counts half.
        confidence: Level of the interval, in (0, 1).
        examples_are_independent: False says that examples of a batch share data, as with mixup or several crops of an
            image: ``"auto"`` then takes ``batch_pair`` instead of ``per_example``. True is checked.
        batch_size_fn: From a batch to the number of examples (or tokens) that the loss is a mean over. By
            default the common first dimension of the batch's tensors. A tensor result stays on its device.
        unit: The name of what is counted. Of any but ``"examples"`` only different samples are independent.
        loss_mean_over: What the loss is divided by: the count of its ``"micro_batch"``, that of the accumulation
            ``"window"`` on all ranks (transformers' ``num_items_in_batch``), or nothing, ``"sum"``. ``"auto"`` is the
            first, unless ``unit`` is a part of an example and gradients grow with their counts, as under the second.
        prefix: Start of the logged keys; two instances in one Trainer need different ones.
        batch_dims: For ``per_example``, where modules (by name or glob) have the batch in another dimension than the
            first, such as ``{"encoder.*": 1}`` for a sequence-first encoder; ``"folded"`` where the first dimension is
            B·k with the k parts of an example one after the other.
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
        probe: Literal[
            "auto", "micro_batch", "sharded", "per_example", "batch_pair", "loss_terms", "consecutive"
        ] = "auto",
        *,
        every_n_steps: int | None = None,
        ema_decay: float = DEFAULT_EMA_DECAY,
        half_life_steps: float | None = None,
        confidence: float = 0.95,
        examples_are_independent: bool = True,
        batch_size_fn: BatchSizeFn | None = None,
        unit: str = "examples",
        loss_mean_over: Literal["auto", "micro_batch", "window", "sum"] = "auto",
        prefix: str = "gns",
        batch_dims: dict[str, int | Literal["folded"]] | None = None,
        layers: Sequence[ModuleSelector] | ModuleSelector | None = None,
        groups: dict[str, Sequence[ModuleSelector] | ModuleSelector] | None = None,
        preconditioned: bool = False,
        curvature_every_n_steps: int | None = None,
        log_figure: bool = False,
    ) -> None:
        super().__init__()
        check_cadence(probe, every_n_steps, ema_decay, half_life_steps)
        check_choice(layers, groups, curvature_every_n_steps, loss_mean_over)
        check_batch_dims(batch_dims)
        check_confidence(confidence)
        self.probe = probe
        self.every_n_steps = every_n_steps
        self.ema_decay = ema_decay
        self.half_life_steps = half_life_steps
        self.confidence = confidence
        self.examples_are_independent = examples_are_independent
        self.batch_size_fn = batch_size_fn
        self.unit = unit
        self.loss_mean_over = loss_mean_over
        self.prefix = prefix
        self.batch_dims = batch_dims
        self.layers = layers
        self.groups = groups
        self.preconditioned = preconditioned
        self.curvature_every_n_steps = curvature_every_n_steps
        self.log_figure = log_figure
        self._choice = ParameterChoice(layers=layers, groups=dict(groups or {}), preconditioned=preconditioned)
        self._worker_results = WorkerResults()
        self._trainer: Trainer | None = None
        self._restores = True
        self._fitting = False
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._stepped = False
        self._watch = RunWatch()
        self._measurements = Measurements(
            self._choice,
            self._worker_results,
            probe=self.probe,
            every_n_steps=self.every_n_steps,
            curvature_every_n_steps=self.curvature_every_n_steps,
            loss_mean_over=self.loss_mean_over,
            metric_settings={"ema_decay": self.ema_decay, "confidence": self.confidence, "unit": self.unit},
        )
        self._probe_choice = ProbeChoice(
            self.probe,
            self._measurements,
            half_life_steps=self.half_life_steps,
            batch_dims=self.batch_dims,
            examples_are_independent=self.examples_are_independent,
        )
        self._log = NoiseScaleLog(self.prefix, self._measurements, self._watch)

    def gradients_were_scaled(self, factor: float) -> None:
        """Say that the gradients of the step under way were multiplied by a factor, in ``on_before_optimizer_step``.

        A callback that does so and stands before this one in the Trainer's list would otherwise look like an error
        in the gradients. If this callback has read them already, the word changes nothing.
        """
        for measurement in self._measurements:
            measurement.gradient_factor = factor

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint, one for each prefix and probe."""
        return self._generate_state_key(prefix=self.prefix, probe=self.probe)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what is known before training, and start afresh."""
        # `test(ckpt_path="best")` after a fit must not put an earlier estimate in the place of the last one
        self._restores = stage == "fit" or not self._measurements.has_measured
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        require_lightning_trainer(trainer, type(self).__name__)
        if self.log_figure:
            import_pyplot()  # not only at the end that matplotlib is missing
        # Lightning restores the state after this hook
        self._start_afresh()
        self._probe_choice.choose(trainer, pl_module, wrapped=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is known once the model is wrapped and the optimizer exists."""
        self._measurements.attach(trainer.optimizers, pl_module)
        # layers that setup or configure_model built were not there before
        self._probe_choice.choose(trainer, pl_module, wrapped=True)
        if self._measurements.curvature is not None:
            self._measurements.curvature.require_measurable(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle what depends on the run; a checkpoint has been restored by now under every strategy."""
        self._trainer = trainer
        self._watch.start(trainer, pl_module)
        self._measurements.keep(len(trainer.optimizers))
        self._probe_choice.start()
        self._probe_choice.look_for_mixers(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a window where Lightning zeroes the gradients, and count the micro-batch."""
        self._watch.start_batch(trainer, batch_idx)
        self._stepped = False
        self._probe_choice.start_batch(trainer, pl_module, batch_idx)
        if self._measurements.curvature is not None:
            # before the probe watches the forward pass: the copy of the model has its hooks, too
            self._measurements.curvature.see_batch(trainer, pl_module, batch, batch_idx, self.batch_size_fn)
        followed = self._measurements.followed
        for measurement in followed:
            measurement.start_batch(trainer, pl_module, batch_idx)
        measuring = any(measurement.measuring or measurement.waits_for_batch for measurement in followed)
        self._watch.note_measuring(measuring)
        # in manual optimization a step may begin at any backward pass
        if measuring or not pl_module.automatic_optimization:
            count = self._probe_choice.count(trainer, batch, self.batch_size_fn)
            for measurement in followed:
                measurement.see_batch(trainer, pl_module, batch, batch_idx, count)
            for measurement in followed:
                measurement.before_forward(count)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the probe record this backward pass."""
        for measurement in self._measurements.followed:
            measurement.before_backward(loss, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the micro-batch's gradient sample."""
        for measurement in self._measurements.followed:
            measurement.after_backward(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read the optimizer's gradient, before clipping, and hand the step to the metric."""
        self._watch.before_step()
        self._stepped = True
        self._measurements.before_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Synchronise and log at log steps."""
        if not self._stepped:
            return
        self._watch.after_step(trainer)
        self._log.note_step(trainer)
        if is_log_step(trainer):
            self._synchronize(trainer)
            self._log.write(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the run's times."""
        self._watch.interrupt()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave what lies between two epochs out of the run's times."""
        self._watch.interrupt()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Synchronise, log and print the last estimate, and leave no hook behind."""
        self._measurements.detach()
        self._watch.end(trainer)
        self._synchronize(trainer)
        self._log.write(trainer)
        if self.log_figure and trainer.is_global_zero:
            self._log.write_figures(trainer)
        if trainer.local_rank == 0:
            self._measurements.hand_over()
        self._log.say_result()
        self._trainer = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and on one device keep what was measured since the last synchronisation."""
        # Lightning calls the callbacks that save checkpoints after this one
        if self._trainer is not None and trainer.world_size == 1:
            with contextlib.suppress(RuntimeError):  # a broken device; its own error must come through
                self._synchronize(trainer)
        self._measurements.detach()
        self._trainer = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives; synchronises first unless the run was interrupted."""
        trainer = self._trainer
        # after an exception a rank may be gone, and waiting for it would lose the checkpoint
        if trainer is not None and (trainer.world_size == 1 or trainer.state.status != TrainerStatus.INTERRUPTED):
            self._synchronize(trainer)
        return self._measurements.state_dict() | {"history": self._log.history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, except where a model is only evaluated after this callback measured.

        What the checkpoint knows of groups that are not measured any more is left out; new groups start afresh.
        """
        if not self._restores:
            return
        self._log.history.load_state_dict(state_dict["history"])
        self._measurements.load_state_dict(state_dict, fitting=self._fitting)
        self._probe_choice.resume_from(state_dict["probe"], state_dict["every_n_steps"])

    def _synchronize(self, trainer: Trainer) -> None:
        self._measurements.synchronize(across_ranks=trainer.world_size > 1)
        if self._measurements.check.verdict():
            self._probe_choice.leave_examples(SHARED_ROWS)
