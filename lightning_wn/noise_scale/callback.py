"""The Lightning callback: wires a probe to the metric and the metric to the logger."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_wn.batch_size.advice import BatchSizeAdvice, RunConfiguration, advise_batch_size
from lightning_wn.lightning_imports import require_lightning_trainer
from lightning_wn.noise_scale.batch_counting import BatchSizeFn, count_examples
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.mailbox import Mailbox
from lightning_wn.noise_scale.metric import GradientNoiseScale, check_confidence, check_ema_decay
from lightning_wn.noise_scale.probes.micro_batch import MicroBatchProbe
from lightning_wn.noise_scale.run_facts import (
    log_interval,
    loss_scale,
    require_dense_gradients,
    trainable_parameters,
)
from lightning_wn.noise_scale.samples import Rejection
from lightning_wn.noise_scale.selection import PROBES, choose_probe
from lightning_wn.noise_scale.summary import WARNINGS, summary_table

_DEFAULT_EMA_DECAY = 0.99
_SYNC_STEPS_WITHOUT_LOGGING = 50

# moments and counts of the metric, cadence, probe
_MAIL_SIZE = sum(len(state) for state in (GradientNoiseScale().moments, GradientNoiseScale().counts)) + 2


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

    Raises:
        ValueError: For arguments out of range, and before training starts for what cannot be measured:
            a strategy other than single-device, DDP and FSDP2, SyncBatchNorm, manual optimization, sparse
            gradients, no trainable parameters. At the first measured batch, if the number of examples cannot be
            inferred.

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
        ema_decay: float = _DEFAULT_EMA_DECAY,
        half_life_steps: float | None = None,
        confidence: float = 0.95,
        batch_size_fn: BatchSizeFn | None = None,
        unit: str = "examples",
        prefix: str = "gns",
    ) -> None:
        super().__init__()
        _check_arguments(probe, every_n_steps, ema_decay, half_life_steps)
        check_confidence(confidence)
        self.probe = probe
        self.every_n_steps = every_n_steps
        self.ema_decay = ema_decay
        self.half_life_steps = half_life_steps
        self.confidence = confidence
        self.batch_size_fn = batch_size_fn
        self.unit = unit
        self.prefix = prefix
        self._mailbox = Mailbox(_MAIL_SIZE)
        self._trainer: Trainer | None = None
        self._restored_every_n_steps: int | None
        self._restores = True
        self._batch_examples: float | Tensor = math.nan
        self._first_batch_examples: float | Tensor = math.nan
        self._start_afresh()

    # ------------------------------------------------------------------ what users ask

    def estimate(self) -> NoiseScaleEstimate:
        """Return the estimate as of the last synchronisation (log step, checkpoint, end of training).

        The same on every rank. Never communicates, so it may be called on one rank alone.
        """
        self._collect_mail()
        return self._metric.estimate(
            probe=self._probe.name, coverage=self._probe.coverage, approximate=bool(self._probe.approximate)
        )

    def advise(self) -> BatchSizeAdvice:
        """Return a batch size to try, with what it would change; as of the last synchronisation."""
        estimate = self.estimate()
        # of the step that the batch size is of, whatever the Trainer's factor has become since
        micro_batches, ranks = self._metric.micro_batches_and_ranks
        run = RunConfiguration(accumulate_grad_batches=micro_batches // ranks, num_ranks=ranks) if ranks else None
        return advise_batch_size(estimate, run or RunConfiguration())

    def reset(self) -> None:
        """Forget all measurements, for instance after a change of the learning rate; on every rank."""
        self._mailbox.collect()
        self._metric.reset()
        self._last_logged_step = -1

    # ------------------------------------------------------------------ life cycle

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint, one for each prefix and probe."""
        return self._generate_state_key(prefix=self.prefix, probe=self.probe)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what is known before training, and start afresh."""
        # `test(ckpt_path="best")` after a fit must not put an earlier estimate in the place of the last one
        self._restores = stage == "fit" or not self.estimate().num_measurements
        if stage != "fit":
            return
        require_lightning_trainer(trainer, type(self).__name__)
        # Lightning restores the state after this hook
        self._start_afresh()
        self._choose_probe(trainer, pl_module, wrapped=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is known once the model is wrapped and the optimizer exists."""
        parameters = trainable_parameters(trainer)
        if not parameters:
            raise ValueError(
                "`GradientNoiseScaleCallback` has nothing to measure: the optimizer holds no parameter with "
                "`requires_grad=True`; pass trainable parameters to the optimizer or remove the callback."
            )
        # layers that setup or configure_model built were not there before
        self._choose_probe(trainer, pl_module, wrapped=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle what depends on the run; a checkpoint has been restored by now under every strategy."""
        self._trainer = trainer
        every_n_steps = self.every_n_steps or self._restored_every_n_steps
        self._every_n_steps = every_n_steps or self._probe.default_every_n_steps
        if self.half_life_steps is not None:
            self._metric.ema_decay = 0.5 ** (self._every_n_steps / self.half_life_steps)
        low_precision = any(p.dtype in (torch.float16, torch.bfloat16) for p in trainable_parameters(trainer))
        # 16-bit gradients are rounded while they accumulate: 8 bits of mantissa, a few additions
        rounded = low_precision or self._probe.reduces_in_low_precision
        self._metric.checksum_tolerance = 0.05 if rounded else 0.01
        if self._probe.approximate:
            rank_zero_warn(
                f"`GradientNoiseScaleCallback` measures with the probe '{self._probe.name}', which is approximate: "
                f"{self._probe.approximate}."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a window where Lightning zeroes the gradients, and count the micro-batch."""
        self._stepped = False
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._measuring = self._probe.is_due(trainer.global_step, self._every_n_steps)
            if self._measuring:
                parameters = trainable_parameters(trainer)
                self._probe.begin(trainer.global_step, self._every_n_steps, pl_module, parameters)
                self._num_micro_batches = 0
        if self._measuring:
            self._batch_examples = count_examples(batch, self.batch_size_fn)
            if not self._num_micro_batches:
                self._first_batch_examples = self._batch_examples
            self._probe.before_forward(self._batch_examples)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the probe record this backward pass."""
        if self._measuring:
            self._probe.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the micro-batch's gradient sample."""
        if self._measuring:
            # Lightning divides the loss by this factor, even in a window that ends early
            weight = 1.0 / trainer.accumulate_grad_batches
            self._probe.after_backward(self._batch_examples, weight, loss_scale(trainer, pl_module.device))
            self._num_micro_batches += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read the optimizer's gradient, before clipping, and hand the step to the metric."""
        self._stepped = True
        if not self._measuring:
            return
        self._measuring = False
        # a fused optimizer unscales within its step: here its gradients are still scaled
        still_scaled = getattr(trainer.optimizers[0], "_step_supports_amp_scaling", False)
        grad_scale = loss_scale(trainer, pl_module.device) if still_scaled else None
        # the last batch of an epoch may be short; a count on the device is not read
        size, first = self._batch_examples, self._first_batch_examples
        unequal = isinstance(size, Tensor) or isinstance(first, Tensor) or size != first
        short = trainer.is_last_batch and unequal
        full = self._num_micro_batches == trainer.accumulate_grad_batches and not short
        samples = self._probe.finish(grad_scale, full=full)
        if samples is not None:
            self._metric.add_samples(samples)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Synchronise and log at log steps."""
        if not self._stepped:
            return
        if trainer.global_step % (log_interval(trainer) or _SYNC_STEPS_WITHOUT_LOGGING) == 0:
            self._synchronize(trainer)
            if log_interval(trainer):
                self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Synchronise, log and print the last estimate, and leave no hook behind."""
        self._probe.detach()
        self._synchronize(trainer)
        if log_interval(trainer):
            self._log(trainer)
        if trainer.local_rank == 0:
            self._post_mail()
        rank_zero_info("\n" + summary_table(self.estimate(), self.advise(), self._metric.rejected, self._every_n_steps))
        if not self._metric.counts[0]:
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
        self._measuring = False
        self._probe.detach()
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
            "moments": self._metric.moments.clone(),
            "counts": self._metric.counts.clone(),
            "every_n_steps": self._every_n_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, except where a model is only evaluated after this callback measured."""
        if not self._restores:
            return
        self._metric.reset()
        self._metric.moments = state_dict["moments"].clone().cpu()
        self._metric.counts = state_dict["counts"].clone().cpu()
        self._restored_every_n_steps = state_dict["every_n_steps"]

    # ------------------------------------------------------------------ inside

    def _start_afresh(self) -> None:
        self._mailbox.collect()
        self._probe = PROBES[MicroBatchProbe.name if self.probe == "auto" else self.probe]()
        self._metric = GradientNoiseScale(ema_decay=self.ema_decay, confidence=self.confidence, unit=self.unit)
        self._every_n_steps = self.every_n_steps or self._probe.default_every_n_steps
        self._restored_every_n_steps = None
        self._measuring = False
        self._stepped = False
        self._num_micro_batches = 0
        self._last_logged_step = -1
        self._warned: set[Rejection] = set()

    def _choose_probe(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        require_dense_gradients(pl_module)
        name = choose_probe(self.probe, trainer, pl_module)
        if name != self._probe.name:
            self._probe = PROBES[name]()
        self._probe.require_readable(trainer, pl_module, wrapped=wrapped)

    def _synchronize(self, trainer: Trainer) -> None:
        before = self._metric.rejected
        self._metric.synchronize(across_ranks=trainer.world_size > 1)
        for reason, count in self._metric.rejected.items():
            if count > before[reason] and reason in WARNINGS and reason not in self._warned:
                self._warned.add(reason)
                rank_zero_warn(f"`GradientNoiseScaleCallback`: {WARNINGS[reason]}")

    def _log(self, trainer: Trainer) -> None:
        # the step that Lightning writes beside its own metrics of this optimizer step
        step = trainer.global_step - 1
        estimate = self.estimate()
        if step == self._last_logged_step or not estimate.num_measurements:
            return
        self._last_logged_step = step
        values = estimate.to_metrics() | {"suggested_batch_size": self.advise().suggested_batch_size}
        if estimate.coverage < 1.0:
            values["coverage"] = estimate.coverage
        values = {f"{self.prefix}/{key}": value for key, value in values.items()}
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def _post_mail(self) -> None:
        probe = list(PROBES).index(self._probe.name)
        state = [*self._metric.moments.tolist(), *self._metric.counts.tolist()]
        self._mailbox.post([*state, self._every_n_steps, probe])

    def _collect_mail(self) -> None:
        """Take over the result of a fit that ran in a spawned or forked process."""
        mail = self._mailbox.collect()
        if mail is None:
            return
        num_moments = len(self._metric.moments)
        self._metric.reset()
        self._metric.moments = torch.tensor(mail[:num_moments], dtype=torch.float64)
        self._metric.counts = torch.tensor(mail[num_moments:-2], dtype=torch.float64)
        self._every_n_steps, probe = map(int, mail[-2:])
        self._probe = PROBES[list(PROBES)[probe]]()


def _check_arguments(probe: str, every_n_steps: int | None, ema_decay: float, half_life_steps: float | None) -> None:
    if probe != "auto" and probe not in PROBES:
        raise ValueError(f"`probe` must be one of {['auto', *PROBES]}, got {probe!r}; 'auto' chooses.")
    if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
        raise ValueError(
            f"`every_n_steps` must be a positive whole number of optimizer steps or None, got {every_n_steps!r}; "
            "None measures one step in 10."
        )
    check_ema_decay(ema_decay)
    if half_life_steps is not None:
        if not half_life_steps > 0:
            raise ValueError(
                f"`half_life_steps` must be a positive number of optimizer steps, got {half_life_steps!r}."
            )
        if ema_decay != _DEFAULT_EMA_DECAY:
            raise ValueError(
                f"`ema_decay={ema_decay!r}` and `half_life_steps={half_life_steps!r}` say the same thing twice; "
                "give one of them."
            )
