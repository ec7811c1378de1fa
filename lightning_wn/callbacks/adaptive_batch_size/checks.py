"""What ``AdaptiveBatchSizeCallback`` refuses, and what it warns of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import LBFGS, Optimizer

from lightning_wn.arguments import is_whole
from lightning_wn.batch_size.learning_rate import BY_NOISE_SCALE, LEARNING_RATE_RULES
from lightning_wn.callbacks.adaptive_batch_size.rule import AccumulationRule
from lightning_wn.callbacks.adaptive_batch_size.schedule import AccumulationSchedule
from lightning_wn.callbacks.noise_scale.callback import GradientNoiseScaleCallback
from lightning_wn.callbacks.scheduler_clock import step_schedulers
from lightning_wn.noise_scale.batch_counting import BatchSizeFn
from lightning_wn.trainer import callbacks_of

_WITHOUT_NOISE_SCALE = [rule for rule in LEARNING_RATE_RULES if rule not in BY_NOISE_SCALE]


def check_steps(name: str, value: object, least: int) -> None:
    """Raise ValueError unless a number of optimizer steps is a whole number, ``least`` or more."""
    if not is_whole(value, least):
        raise ValueError(f"`{name}` must be a whole number of optimizer steps, {least} or more, got {value!r}.")


def check_clock(scheduler_clock: str) -> None:
    """Raise ValueError for a clock that there is not."""
    if scheduler_clock not in (clocks := ["auto", "batches", "steps"]):
        raise ValueError(f"`scheduler_clock` must be one of {clocks}, got {scheduler_clock!r}.")


def check_schedule_alone(callback_type: type[Callback], given: Mapping[str, Any]) -> None:
    """Raise ValueError if an argument beside the schedule was given that a schedule leaves no room for."""
    parameters = inspect.signature(callback_type).parameters
    changed = [name for name, value in given.items() if value != parameters[name].default]
    if changed:
        raise ValueError(
            f"`{changed[0]}={given[changed[0]]!r}` is for following the noise scale and means nothing along a "
            "`schedule`, which says all factors itself; remove one of the two."
        )


def check_counting(schedule_by: str, batch_size_fn: BatchSizeFn | None) -> None:
    """Raise ValueError if nothing says how to count tokens."""
    if schedule_by == "tokens" and batch_size_fn is None:
        raise ValueError(
            "`schedule_by='tokens'` needs `batch_size_fn`, a function from a batch to its number of tokens, for "
            "instance one that returns `batch['attention_mask'].sum()`."
        )


def require_accumulation(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise ValueError where ``accumulate_grad_batches`` is not Lightning's own affair."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            "`AdaptiveBatchSizeCallback` works through `accumulate_grad_batches`, which Lightning leaves to you in "
            "manual optimization; use automatic optimization or remove the callback."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise ValueError(
            "`AdaptiveBatchSizeCallback` cannot change `accumulate_grad_batches` under "
            f"{type(trainer.strategy).__name__}, which accumulates by itself; use DDP or FSDP2, or remove the callback."
        )


def require_one_backward_pass(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer that runs the closure again and again."""
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "`AdaptiveBatchSizeCallback` cannot accumulate for LBFGS, which runs several backward passes a step; use "
            "another optimizer or remove the callback."
        )


def require_learning_rates(optimizer: Optimizer) -> None:
    """Raise ValueError if there is nothing that a factor could multiply."""
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"`AdaptiveBatchSizeCallback` cannot rescale the learning rate of {type(optimizer).__name__}, which has "
            "none in its parameter groups; use `learning_rate='none'`."
        )


def require_alone(trainer: Trainer, callback_type: type[Callback]) -> None:
    """Raise ValueError if something else in the Trainer would change ``accumulate_grad_batches``."""
    found = callbacks_of(trainer)
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in found):
        raise ValueError(
            f"`{callback_type.__name__}` and `GradientAccumulationScheduler` would both change "
            "`accumulate_grad_batches`; remove one of them (`schedule={0: 1, 4: 2}` with `schedule_by='epoch'` does "
            "the same)."
        )
    if sum(isinstance(callback, callback_type) for callback in found) > 1:
        raise ValueError(
            f"Two `{callback_type.__name__}`s in one Trainer would both change `accumulate_grad_batches`; remove one "
            "of them."
        )


def find_noise_scale(trainer: Trainer, prefix: str | None, *, needed: bool) -> GradientNoiseScaleCallback | None:
    """Return the Trainer's noise-scale callback, the one with this prefix or else the only one.

    Raises:
        ValueError: If there is none though one is needed, or if it is not clear which.
    """
    found = [callback for callback in callbacks_of(trainer) if isinstance(callback, GradientNoiseScaleCallback)]
    named = [callback for callback in found if prefix is None or callback.prefix == prefix]
    if len(named) == 1:
        return named[0]
    if not needed and prefix is None:
        return None
    if not found:
        raise ValueError(
            "`AdaptiveBatchSizeCallback` follows the noise scale, and the Trainer has no `GradientNoiseScaleCallback`; "
            "add one to `Trainer(callbacks=[...])`, or give a `schedule` with a `learning_rate` of "
            f"{_WITHOUT_NOISE_SCALE}."
        )
    raise ValueError(
        f"`noise_scale_prefix` must name one of the Trainer's `GradientNoiseScaleCallback`s, got {prefix!r}; their "
        f"prefixes are {[callback.prefix for callback in found]}."
    )


def require_noise_scale(callback: GradientNoiseScaleCallback, learning_rate: str, step: int) -> float:
    """Return the noise scale in micro-batches; raise RuntimeError if none was measured before this optimizer step."""
    noise_scale = callback.estimate().noise_scale / callback.micro_batch_size
    if math.isnan(noise_scale):
        raise RuntimeError(
            f"`learning_rate={learning_rate!r}` goes by the noise scale, and none was measured before the schedule "
            f"changed the batch size at optimizer step {step}; let the schedule begin later, lower "
            f"`log_every_n_steps`, or use a `learning_rate` of {_WITHOUT_NOISE_SCALE}."
        )
    return noise_scale


def require_reachable_start(own: int, rule: AccumulationRule, schedule: AccumulationSchedule | None) -> None:
    """Raise ValueError if the Trainer's own ``accumulate_grad_batches`` contradicts the arguments."""
    if schedule is not None:
        first = schedule.factor_at(0, own)
        if own not in (1, first):
            raise ValueError(
                f"`Trainer(accumulate_grad_batches={own})` and `schedule={{0: {first}, ...}}` contradict each other on "
                "the start; remove one of them."
            )
    elif own < rule.min_accumulate or (rule.max_accumulate is not None and own > rule.max_accumulate):
        raise ValueError(
            f"`Trainer(accumulate_grad_batches={own})`, where the run starts, must lie between "
            f"`min_accumulate={rule.min_accumulate}` and `max_accumulate={rule.max_accumulate}`; change one of them."
        )


def warn_of_steps(trainer: Trainer, *, by_batches: bool, shrinks: bool) -> None:
    """Warn of what counts optimizer steps and was planned for steps of one size.

    Args:
        trainer: The Trainer.
        by_batches: Whether step-based schedulers are kept in time with the batches.
        shrinks: Whether the batch size may go below its first one.
    """
    if trainer.max_steps != -1:
        rank_zero_warn(
            f"`Trainer(max_steps={trainer.max_steps})` counts optimizer steps, whose examples become more or fewer "
            "with the batch size of `AdaptiveBatchSizeCallback`; `max_epochs` ends after the same examples."
        )
    odd = [c.frequency for c in trainer.lr_scheduler_configs if c.interval == "step" and c.frequency != 1]
    if odd and by_batches:
        rank_zero_warn(
            f"A learning-rate scheduler with `interval='step'` and `frequency={odd[0]}` goes on counting optimizer "
            "steps, which become fewer as the batch size grows; use `frequency=1`, or `interval='epoch'`."
        )
    if shrinks and by_batches and step_schedulers(trainer):
        rank_zero_warn(
            "Learning-rate schedulers with `interval='step'` run ahead while the batch size is below its first one, "
            "for Lightning steps them at every optimizer step; use `interval='epoch'`, or start with a lower "
            "`accumulate_grad_batches`."
        )


def warn_of_approximate() -> None:
    """Warn that an approximate noise scale is not followed."""
    rank_zero_warn(
        "`AdaptiveBatchSizeCallback` does not follow an approximate noise scale, as the probe 'consecutive' gives it; "
        "start with `Trainer(accumulate_grad_batches=2)` or more and `probe='auto'`, which is exact."
    )
