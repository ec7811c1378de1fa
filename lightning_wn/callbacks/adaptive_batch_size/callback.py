"""The Lightning callback that follows the noise scale, or a schedule, with the batch size."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info

from lightning_wn.batch_size.learning_rate import (
    LearningRateRule,
    check_learning_rate_rule,
    learning_rate_factor,
    needs_noise_scale,
)
from lightning_wn.callbacks.adaptive_batch_size.checks import (
    check_clock,
    check_counting,
    check_schedule_alone,
    check_steps,
    find_noise_scale,
    require_accumulation,
    require_alone,
    require_learning_rates,
    require_noise_scale,
    require_one_backward_pass,
    require_reachable_start,
    warn_of_approximate,
    warn_of_steps,
)
from lightning_wn.callbacks.adaptive_batch_size.counting import TrainedOn
from lightning_wn.callbacks.adaptive_batch_size.rule import AccumulationRule
from lightning_wn.callbacks.adaptive_batch_size.schedule import AccumulationSchedule, ScheduleUnit
from lightning_wn.callbacks.noise_scale.callback import GradientNoiseScaleCallback
from lightning_wn.callbacks.scheduler_clock import SchedulerClock
from lightning_wn.callbacks.whole_windows import WholeWindows
from lightning_wn.callbacks.worker_results import WorkerResults
from lightning_wn.noise_scale.batch_counting import BatchSizeFn
from lightning_wn.trainer import is_log_step, log_interval, log_metrics, require_lightning_trainer, step_to_log


class AdaptiveBatchSizeCallback(WholeWindows):
    r"""Changes the batch size while training, through ``accumulate_grad_batches``.

    Either toward a fraction of the noise scale that a :class:`~lightning_wn.GradientNoiseScaleCallback` in the same
    Trainer measures, or along a fixed schedule. At the batch size θ·B_crit training takes 1 + θ times the fewest
    possible examples and 1 + 1/θ times the fewest possible optimizer steps (McCandlish et al., arXiv 1812.06162,
    section 2.3); the noise scale usually grows while the loss falls, and a batch size that grows with it saves steps
    at the end without wasting examples at the start.

    Every optimizer step uses the mean gradient of a whole accumulation window: the factor changes only where a
    window has ended and where Lightning zeroes the gradients for the new factor, which is at a batch index that both
    divide and at the start of every epoch. Where an epoch ends within a window, Lightning divides by the whole
    factor; here that gradient is made the mean of the micro-batches that are there, before clipping.

    The learning rate that you set, with any scheduler, is that of the first batch size. ``learning_rate`` says how it
    goes with the batch size; its factor is there only within the optimizer's step, where no scheduler and no
    checkpoint sees it.

    At every log step these keys go to all loggers and into ``trainer.callback_metrics``:

    - ``adaptive/accumulate_grad_batches``: micro-batches in an optimizer step of each rank
    - ``adaptive/learning_rate_factor``: what the learning rate is multiplied with
    - ``adaptive/batch_size``: the batch size, in the noise scale's unit; once it is measured
    - ``adaptive/target_batch_size``: the batch size that is wished for, before bounds, in the same unit

    Args:
        target: θ, the wished fraction of the noise scale. 0.1 costs at most 10 % more than the fewest possible
            examples. The lower end of the noise scale's interval decides how far to go up, its upper end how far down.
        schedule: Instead of the noise scale, ``accumulate_grad_batches`` by position: ``{0: 1, 1000: 2, 5000: 4}``.
        schedule_by: What the schedule's positions count: ``"step"``, ``"epoch"``, ``"examples"``, or ``"tokens"``, the
            last two over all ranks, by one tiny sum over the ranks an optimizer step.
        batch_size_fn: For these two: from a batch to its number of examples or tokens. By default the common first
            dimension of the batch's tensors; ``"tokens"`` needs it.
        min_accumulate: Fewest micro-batches in an optimizer step.
        max_accumulate: Most micro-batches in an optimizer step. None is the number of batches in an epoch.
        growth: Largest factor of one change.
        hysteresis: No change unless the wish is this share away from the present batch size.
        every_n_steps: Fewest optimizer steps between two changes. The noise scale is looked at after log steps.
        warmup_steps: Optimizer steps without a change at the start.
        learning_rate: ``"sqrt"``: the root of the batch sizes' ratio. ``"linear"``: the ratio. ``"sgd"`` and
            ``"adam"``: by the noise scale at the change (section 2.2), ``"adam"`` the root of ``"sgd"``. ``"none"``:
            no change.
        scheduler_clock: What step-based learning-rate schedulers count. ``"batches"``: as many steps as with the first
            batch size, so that a schedule over the data stays one. ``"steps"``: optimizer steps. ``"auto"``: the
            former, but the latter with ``Trainer(max_steps=...)``, so that the schedule ends with the training.
        allow_decrease: Whether the batch size may shrink again, which accumulation can down to ``min_accumulate``.
        noise_scale_prefix: ``prefix`` of the noise-scale callback to follow; None is the only one.
        prefix: Start of the logged keys.

    Raises:
        ValueError: For arguments out of range; before training for manual optimization, DeepSpeed, LBFGS, a second
            callback that changes ``accumulate_grad_batches``, and without a noise scale where one is needed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_wn import GradientNoiseScaleCallback
        >>> callbacks = [GradientNoiseScaleCallback(), AdaptiveBatchSizeCallback(max_accumulate=64)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
        >>> # trainer.fit(model, data)
        >>> callbacks[1].accumulate_grad_batches
        1
    """

    def __init__(
        self,
        target: float = 0.1,
        *,
        schedule: dict[int, int] | None = None,
        schedule_by: ScheduleUnit = "step",
        batch_size_fn: BatchSizeFn | None = None,
        min_accumulate: int = 1,
        max_accumulate: int | None = None,
        growth: float = 2.0,
        hysteresis: float = 0.1,
        every_n_steps: int = 100,
        warmup_steps: int = 0,
        learning_rate: LearningRateRule = "sqrt",
        scheduler_clock: Literal["auto", "batches", "steps"] = "auto",
        allow_decrease: bool = False,
        noise_scale_prefix: str | None = None,
        prefix: str = "adaptive",
    ) -> None:
        super().__init__()
        self._rule = AccumulationRule(
            target=target,
            min_accumulate=min_accumulate,
            max_accumulate=max_accumulate,
            growth=growth,
            hysteresis=hysteresis,
            allow_decrease=allow_decrease,
        )
        check_learning_rate_rule(learning_rate)
        check_steps("every_n_steps", every_n_steps, 1)
        check_steps("warmup_steps", warmup_steps, 0)
        check_clock(scheduler_clock)
        self._schedule = None if schedule is None else AccumulationSchedule(schedule, schedule_by)
        if schedule is not None:
            other = asdict(self._rule) | {"every_n_steps": every_n_steps, "warmup_steps": warmup_steps}
            check_schedule_alone(AdaptiveBatchSizeCallback, other)
            check_counting(schedule_by, batch_size_fn)
        self.target = target
        self.every_n_steps = every_n_steps
        self.warmup_steps = warmup_steps
        self.learning_rate = learning_rate
        self.scheduler_clock = scheduler_clock
        self.batch_size_fn = batch_size_fn
        self.noise_scale_prefix = noise_scale_prefix
        self.prefix = prefix
        self._worker_results = WorkerResults()
        self._trainer: Trainer | None = None
        self._noise_scale: GradientNoiseScaleCallback | None = None
        self._trainers_own = 1
        self._restores = True
        self._factor: int
        self._learning_rate_factor: float
        self._clock: SchedulerClock
        self._trained_on: TrainedOn | None
        self._said_approximate: bool
        self._start_afresh(1)

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches in an optimizer step of each rank, now or at the end of the last fit."""
        self._collect_results()
        return self._factor

    @property
    def learning_rate_factor(self) -> float:
        """What the optimizer's learning rates are multiplied with in its step."""
        self._collect_results()
        return self._learning_rate_factor

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint."""
        return self._generate_state_key(prefix=self.prefix)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what is known before training, and start afresh."""
        self._restores = stage == "fit"
        if stage != "fit":
            return
        require_lightning_trainer(trainer, type(self).__name__)
        require_accumulation(trainer, pl_module)
        require_alone(trainer, AdaptiveBatchSizeCallback)
        needed = self._schedule is None or needs_noise_scale(self.learning_rate)
        self._noise_scale = find_noise_scale(trainer, self.noise_scale_prefix, needed=needed)
        self._trainers_own = trainer.accumulate_grad_batches
        require_reachable_start(self._trainers_own, self._rule, self._schedule)
        # Lightning restores the state after this hook
        self._start_afresh(self._trainers_own)
        if self._schedule is not None:
            self._clock.first = self._schedule.factor_at(0, self._trainers_own)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from a checkpoint, which has been restored by now, and take hold of the optimizer's step."""
        require_accumulation(trainer, pl_module)  # the model may have made up its mind in `configure_model`
        optimizer = trainer.optimizers[0]
        require_one_backward_pass(optimizer)
        if self.learning_rate != "none":
            require_learning_rates(optimizer)
        self._trainer = trainer
        trainer.accumulate_grad_batches = self._factor
        self._take_hold_of_optimizer(optimizer, self._learning_rate_factor)
        lowest = self._rule.min_accumulate if self._rule.allow_decrease else self._clock.first
        warn_of_steps(
            trainer,
            by_batches=self._clock_is_batches(trainer),
            shrinks=(lowest if self._schedule is None else self._schedule.lowest) < self._clock.first,
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change the factor where a window starts with the old one and with the new one."""
        self._stepped = False
        if batch_idx == 0:
            self._clock.start_epoch()
        if getattr(trainer.fit_loop, "_skip_backward", False):
            return  # StochasticWeightAveraging passes over the data once more, for the batch norms
        if trainer.accumulate_grad_batches != self._factor:
            raise RuntimeError(
                f"`accumulate_grad_batches` was changed from {self._factor} to {trainer.accumulate_grad_batches} while "
                "`AdaptiveBatchSizeCallback` looks after it; let only one of them change it."
            )
        if batch_idx % self._factor == 0:
            self._decide(trainer)
            if self._wanted != self._factor and batch_idx % self._wanted == 0:
                self._change(trainer)
        if self._trained_on is not None:
            self._trained_on.see(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep step-based schedulers in time, and log at log steps."""
        if not self._stepped:
            return
        if self._clock_is_batches(trainer):
            self._clock.make_up(trainer, pl_module, batch_idx + 1, is_last=trainer.is_last_batch)
        if is_log_step(trainer):
            self._looks = True
            if log_interval(trainer):
                self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizer as it was."""
        self._let_go_of_optimizer()
        if self._trained_on is not None:
            self._trained_on.pool(trainer, together=True)
        if trainer.local_rank == 0:
            self._worker_results.hand_over(self._state())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizer and the Trainer as they were, also in the middle of a step."""
        self._let_go_of_optimizer()
        self._let_go_of_trainer(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Trainer its own factor back, after all other callbacks have ended."""
        self._let_go_of_trainer(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return primitives; sums up what was counted unless the run was interrupted."""
        self._collect_results()
        if self._trainer is not None and self._trained_on is not None:
            # after an exception a rank may be gone, and waiting for it would lose the checkpoint
            together = self._trainer.state.status != TrainerStatus.INTERRUPTED
            self._trained_on.pool(self._trainer, together=together)
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "accumulate_grad_batches": self._factor,
            "wanted": self._wanted,
            "first": self._clock.first,
            "learning_rate_factor": self._learning_rate_factor,
            "last_change": self._last_change,
            "looks": self._looks,
            "counted": 0.0 if self._trained_on is None else self._trained_on.total,
            "scheduler_steps": [self._clock.in_epoch, self._clock.behind],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, if a fit goes on."""
        if self._restores:
            self._take_over(state_dict)

    def _take_over(self, state_dict: dict[str, Any]) -> None:
        self._factor = state_dict["accumulate_grad_batches"]
        self._wanted = state_dict["wanted"]
        self._learning_rate_factor = state_dict["learning_rate_factor"]
        self._last_change = state_dict["last_change"]
        self._looks = state_dict["looks"]
        if self._trained_on is not None:
            self._trained_on.total = state_dict["counted"]
        self._clock = SchedulerClock(state_dict["first"])
        self._clock.in_epoch, self._clock.behind = state_dict["scheduler_steps"]

    def _decide(self, trainer: Trainer) -> None:
        if self._schedule is not None:
            self._wanted = self._schedule.factor_at(self._position(trainer, self._schedule.unit), self._trainers_own)
            return
        # a resumed run may have got other bounds
        self._wanted = self._rule.bounded(self._wanted)
        # a checkpoint brings the estimate up to date, too, and must not change what is decided: only log steps count
        looks, self._looks = self._looks, False
        waits = trainer.global_step < max(self._last_change + self.every_n_steps, self.warmup_steps)
        if not looks or waits or self._wanted != self._factor:
            return
        assert self._noise_scale is not None
        estimate = self._noise_scale.estimate()
        if estimate.approximate and estimate.num_measurements:
            if not self._said_approximate:
                self._said_approximate = True
                warn_of_approximate()
            return
        self._wanted = self._rule.next_factor(
            self._factor,
            micro_batch=self._noise_scale.micro_batch_size,
            lower=estimate.lower,
            upper=estimate.upper,
            most=trainer.num_training_batches,
        )

    def _position(self, trainer: Trainer, unit: ScheduleUnit) -> float:
        if unit == "step":
            return float(trainer.global_step)
        if unit == "epoch":
            return float(trainer.current_epoch)
        assert self._trained_on is not None
        self._trained_on.pool(trainer, together=True)
        return self._trained_on.total

    def _change(self, trainer: Trainer) -> None:
        old, self._factor = self._factor, self._wanted
        trainer.accumulate_grad_batches = self._factor
        self._last_change = trainer.global_step
        noise_scale = math.nan
        if needs_noise_scale(self.learning_rate):
            assert self._noise_scale is not None
            noise_scale = require_noise_scale(self._noise_scale, self.learning_rate, trainer.global_step)
        self._learning_rate_factor = learning_rate_factor(
            self.learning_rate, self._clock.first, self._factor, noise_scale
        )
        assert self._scaled is not None
        self._scaled.factor = self._learning_rate_factor
        rank_zero_info(
            f"`AdaptiveBatchSizeCallback`: accumulate_grad_batches={self._factor} instead of {old} from optimizer step "
            f"{trainer.global_step} on; learning rate x{self._learning_rate_factor:.3g} of what you set."
        )

    def _start_afresh(self, factor: int) -> None:
        self._worker_results.collect()
        self._factor = factor
        self._wanted = factor
        self._learning_rate_factor = 1.0
        self._last_change = 0
        self._looks = False
        counts = self._schedule is not None and self._schedule.unit in ("examples", "tokens")
        self._trained_on = TrainedOn(self.batch_size_fn) if counts else None
        self._clock = SchedulerClock(factor)
        self._stepped = False
        self._said_approximate = False

    def _let_go_of_trainer(self, trainer: Trainer) -> None:
        # StochasticWeightAveraging puts back in `on_train_end` what it found
        if self._trainer is not None:
            trainer.accumulate_grad_batches = self._trainers_own
        self._trainer = None

    def _clock_is_batches(self, trainer: Trainer) -> bool:
        return self.scheduler_clock == "batches" or (self.scheduler_clock == "auto" and trainer.max_steps == -1)

    def _log(self, trainer: Trainer) -> None:
        values = {"accumulate_grad_batches": float(self._factor), "learning_rate_factor": self._learning_rate_factor}
        noise_scale = self._noise_scale
        if noise_scale is not None and (micro_batch := noise_scale.micro_batch_size) > 0.0:
            wished = self._wanted * micro_batch
            if self._schedule is None:
                estimate = noise_scale.estimate()
                wished = self._rule.wished_batch_size(
                    self._factor, micro_batch=micro_batch, lower=estimate.lower, upper=estimate.upper
                )
            values |= {"batch_size": self._factor * micro_batch, "target_batch_size": wished}
        log_metrics(trainer, {f"{self.prefix}/{key}": value for key, value in values.items()}, step_to_log(trainer))

    def _collect_results(self) -> None:
        """Take over the result of a fit that ran in a spawned or forked process."""
        result = self._worker_results.collect()
        if result is not None:
            self._take_over(result)
