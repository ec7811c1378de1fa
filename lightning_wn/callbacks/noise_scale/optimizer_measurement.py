"""One optimizer under measurement: its probe, its metric, and the optimizer step that is under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_wn.module_selectors import ModuleSelection
from lightning_wn.noise_scale.batch_counting import BatchCount
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters, are_lazy, find_measured
from lightning_wn.noise_scale.metric import GradientNoiseScale
from lightning_wn.noise_scale.preconditioning import AdamDenominator
from lightning_wn.noise_scale.samples import GradientSamples, Rescaled
from lightning_wn.probes.base import Probe, same_parameters
from lightning_wn.trainer import epoch_has_same_examples, has_loss_scaler, loss_scale

PRECONDITIONED = "preconditioned"
LossMeanOver = Literal["auto", "micro_batch", "window", "sum"]
"""What the losses of an optimizer step are divided by; see :class:`~lightning_wn.GradientNoiseScaleCallback`."""


@dataclass(frozen=True, kw_only=True)
class ParameterChoice:
    """Which of an optimizer's parameters are measured, as the user says it.

    Attributes:
        layers: What to measure; None is everything that the optimizer moves.
        groups: What to measure beside the total, by name.
        preconditioned: Whether to measure the gradient as the optimizer's denominator scales it, too.
    """

    layers: ModuleSelection | None = None
    groups: Mapping[str, ModuleSelection] = field(default_factory=dict)
    preconditioned: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what is measured beside the total."""
        return (*self.groups, *([PRECONDITIONED] if self.preconditioned else []))

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of what has a coverage of its own; the preconditioned gradient has the total's."""
        return ("total", *self.groups)

    def find(self, model: nn.Module, trainable: list[nn.Parameter], optimizer: Optimizer) -> MeasuredParameters:
        """Find the parameters in the model; see :func:`~.measured_parameters.find_measured` for errors."""
        denominator = AdamDenominator(optimizer) if self.preconditioned else None
        return find_measured(model, trainable, layers=self.layers, groups=self.groups, denominator=denominator)


class OptimizerMeasurement:
    """Follows one optimizer from step to step and hands what its probe collects to its metric.

    Under automatic optimization a step is an accumulation window, which starts where Lightning zeroes the gradients.
    In manual optimization it is whatever contributes to ``Parameter.grad`` between the optimizer's steps: it
    starts with a batch, or anew where the gradients were zeroed; backward passes that do not reach this optimizer's
    parameters are none of its samples, and two of the same batch cannot be told from two samples, so that such a
    step is left out. Lightning does not know there how the losses are weighted: their sum is taken as it is.

    Args:
        choice: Which parameters to measure.
        metric: Takes the samples.
        probe: Collects them.
        loss_mean_over: What the losses are divided by.
    """

    def __init__(
        self,
        choice: ParameterChoice,
        metric: GradientNoiseScale,
        probe: Probe,
        loss_mean_over: LossMeanOver = "auto",
    ) -> None:
        self.choice = choice
        self.loss_mean_over = loss_mean_over
        self.metric = metric
        self.probe = probe
        self.every_n_steps = probe.default_every_n_steps
        self.steps = 0
        """Optimizer steps so far, counted in manual optimization, where the Trainer counts all optimizers' together."""
        self.num_due = 0
        """Optimizer steps that were to be measured."""
        self.num_late = 0
        """Those that began anew after the forward pass that the probe would have had to see."""
        self._off = False
        self._optimizer: Optimizer | None = None
        self._measured: MeasuredParameters | None = None
        self._shares = (1.0,) * len(choice.covered)
        self._trainable: list[nn.Parameter] = []
        self._manual = False
        self._alone = True
        self._batch: BatchCount | None = None
        self._steps_of_batch = 0
        self._first_size: float | Tensor = 0.0
        self._last_size: float | Tensor = 0.0
        # of the gradients after and before a backward pass
        self._marks: list[tuple[int, int] | None] = []
        self._marks_before: list[tuple[int, int] | None] = []
        self._close()

    def estimate(self, group: str | None = None) -> NoiseScaleEstimate:
        """Return the estimate of all measured parameters or of a group, as of the last synchronisation."""
        # what the optimizer preconditions is what the total is of
        coverage = dict(zip(self.choice.covered, self.coverage, strict=True))
        estimate = self.metric.last_estimate(
            group,
            probe=self.probe.name,
            coverage=coverage.get(group or "total", self.coverage[0]),
            approximate=bool(self.probe.approximate),
        )
        return replace(estimate, unchecked=self.probe.unchecked)

    @property
    def coverage(self) -> tuple[float, ...]:
        """Measured share of the trainable parameters: of all, and of each group; 1 before they are known."""
        return tuple(share * self.probe.coverage for share in self._shares)

    @coverage.setter
    def coverage(self, shares: tuple[float, ...]) -> None:
        """Take over what another process or an earlier run has measured."""
        self._shares = shares

    def attach(self, optimizer: Optimizer, model: LightningModule, *, alone: bool) -> None:
        """Take this optimizer; ``alone`` says whether it is the run's only one.

        Raises:
            ValueError: If it moves nothing that can be measured, or the choice of parameters does not fit.
        """
        self._optimizer = optimizer
        self._manual = not model.automatic_optimization
        self._alone = alone
        self._close()
        if alone and not self.parameters:
            raise ValueError(
                "`GradientNoiseScaleCallback` has nothing to measure: the optimizer holds no parameter with "
                "`requires_grad=True`; pass trainable parameters to the optimizer or remove the callback."
            )
        self._find_parameters(model)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves; fine-tuning callbacks change it in mid-run, and toggled optimizers in mid-batch."""
        assert self._optimizer is not None
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def detach(self) -> None:
        """Leave no hook behind and forget the step."""
        self.probe.detach()
        self._close()

    def switch_off(self) -> None:
        """Measure nothing any more."""
        self.detach()
        self._off = True

    def leave_out(self) -> None:
        """Leave out the step that is under way, on all ranks alike: what it is a mean over is not known here."""
        self._irregular = True

    def take_probe(self, probe: Probe) -> None:
        """Go on with another probe, from the next step on."""
        self.detach()
        self.probe = probe

    def start_batch(self, trainer: Trainer, model: LightningModule, batch_idx: int) -> None:
        """Start a step where one starts."""
        self._backwards_of_batch = self._steps_of_batch = 0
        if not self._manual:
            if batch_idx % trainer.accumulate_grad_batches == 0:
                self._open(trainer.global_step, model)
        elif not self._is_open:
            self._open(self.steps, model)

    @property
    def waits_for_batch(self) -> bool:
        """Whether the probe has to see the next batch for a step that ended before."""
        return self.probe.waits_for_batch

    def see_batch(
        self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int, count: BatchCount
    ) -> None:
        """Show the probe a batch, which may complete the samples of a step that ended before."""
        if self.measuring or self.probe.waits_for_batch or self._manual:
            samples = self.probe.see_batch(trainer, model, batch, batch_idx, count)
            if samples is not None:
                self.metric.add_samples(samples)

    def before_forward(self, count: BatchCount) -> None:
        """Count the batch, if the step is measured."""
        self._batch = count
        if self.measuring:
            self.probe.before_forward(count)

    def before_backward(self, loss: Tensor, model: LightningModule) -> None:
        """Let the probe record this backward pass."""
        if self._manual:
            self._begin_late(model)
        if self.measuring:
            if not self._alone:
                self._marks_before = self._gradient_marks()
            self.probe.before_backward(loss)

    def after_backward(self, trainer: Trainer, model: LightningModule) -> None:
        """Close the micro-batch's gradient sample."""
        if not self.measuring or self._batch is None:
            return
        self.probe.end_backward()
        if self._manual:
            if not self._alone and not self._reached():
                return
            self._marks = self._gradient_marks()
            self._backwards_of_batch += 1
            if self._backwards_of_batch > 1:
                self._irregular |= self.probe.watches_backward
                return
        size = self._batch.total
        if not self.num_micro_batches:
            self._first_size = size
        self.probe.after_backward(size, self._weight(trainer), loss_scale(trainer, model.device))
        self._last_size = size
        self.num_micro_batches += 1

    def before_step(self, trainer: Trainer, model: LightningModule) -> None:
        """Read the optimizer's gradient, before clipping, and hand the step to the metric."""
        self.steps += 1
        self.num_due += self.measuring
        self._steps_of_batch += 1
        if self.measuring:
            self.probe.step_of_batch = self._steps_of_batch
            # a fused optimizer unscales within its step: here its gradients are still scaled
            still_scaled = getattr(self._optimizer, "_step_supports_amp_scaling", False)
            grad_scale = loss_scale(trainer, model.device) if still_scaled else None
            if self.gradient_factor != 1.0:
                own = torch.tensor(self.gradient_factor, dtype=torch.float64)
                grad_scale = own if grad_scale is None else grad_scale * own
            # the last batch of an epoch may be short; a count on the device is not read
            first, last = self._first_size, self._last_size
            unequal = isinstance(last, Tensor) or isinstance(first, Tensor) or last != first
            short = trainer.is_last_batch and unequal
            complete = self._manual or self.num_micro_batches == trainer.accumulate_grad_batches
            samples = self.probe.finish(grad_scale, full=complete and not short)
            if samples is not None:
                samples = self._weighted(samples, trainer)
                # a scaler's factor has been taken out of the gradients by now
                edited = self._manual and not has_loss_scaler(trainer) and self._was_changed()
                samples = replace(samples, irregular=samples.irregular or self._irregular or edited)
                self.metric.add_samples(samples)
        self._close()

    def _weight(self, trainer: Trainer) -> float:
        """Return what the gradient of a micro-batch's mean loss was multiplied with, as far as it is known by now."""
        # Lightning divides the loss by this factor, even in a window that ends early
        by_lightning = 1.0 if self._manual else 1.0 / trainer.accumulate_grad_batches
        if self.loss_mean_over in ("auto", "micro_batch") or self.probe.loss_is_sum:
            return by_lightning
        # the whole window's gradient is a mean as it is
        return 1.0 if self.probe.watches_backward else float(not self.num_micro_batches)

    def _weighted(self, samples: GradientSamples, trainer: Trainer) -> GradientSamples:
        """Return the step's samples with their weights in the optimizer's gradient, now that the window is complete."""
        # the only step of an epoch has all its data, and so has the next one
        repeats = epoch_has_same_examples(trainer, self.num_micro_batches)
        guessed = self.loss_mean_over == "auto" and not self._manual and not isinstance(samples.weights, Tensor)
        samples = replace(samples, repeats=repeats, weights_guessed=guessed and self.probe.watches_backward)
        if self.loss_mean_over in ("auto", "micro_batch"):
            # whatever the losses were weighted with in manual optimization, their sum is what the optimizer follows
            return samples.scaled(self.num_micro_batches) if self._manual else samples
        if not self.probe.watches_backward:
            return samples
        if self.loss_mean_over == "window":
            return samples.weighted_by_sizes(Rescaled.SAMPLES)
        sums = samples.weighted_by_sizes(Rescaled.MEAN)
        return sums if self._manual else sums.scaled(trainer.accumulate_grad_batches)

    def _open(self, step: int, model: LightningModule) -> None:
        self._close()
        self._is_open = True
        if self._off or not self.probe.is_due(step, self.every_n_steps):
            return
        if (measured := self._find_parameters(model)) is not None:
            self.probe.optimizer = self._optimizer
            self.probe.loss_is_sum = self.loss_mean_over == "sum" and not self.probe.watches_backward
            self.probe.begin(step, self.every_n_steps, model, measured)
            self.measuring = True

    def _close(self) -> None:
        """Forget the step that is under way."""
        self.measuring = False
        self.gradient_factor = 1.0
        """What another callback multiplied the gradients of this step with."""
        self.num_micro_batches = 0
        self._is_open = False
        self._irregular = False
        self._backwards_of_batch = 0
        self._marks, self._marks_before = [], []

    def _find_parameters(self, model: LightningModule) -> MeasuredParameters | None:
        """Return what is measured, or None before there is anything: lazy layers get their weights at a first batch."""
        trainable = self.parameters
        if not trainable or are_lazy(trainable):
            return None
        if self._measured is None or not same_parameters(trainable, self._trainable):
            assert self._optimizer is not None
            self._measured = self.choice.find(model, trainable, self._optimizer)
            self._shares = self._measured.coverage
            self._trainable = trainable
        return self._measured

    def _begin_late(self, model: LightningModule) -> None:
        """Start a further step on the same batch, or anew where the gradients were zeroed, after the forward pass."""
        goes_on = self._is_open and not (self.measuring and self.num_micro_batches and self._was_changed())
        # `toggle_optimizer` of another one switches these parameters off: this pass cannot reach them
        if goes_on or not self.parameters:
            return
        begins_anew = self._is_open
        self._open(self.steps, model)
        if self.measuring and self.probe.watches_forward:
            self.measuring = False
            self.num_late += begins_anew
            if self.num_late > self.num_due:
                self.probe.refusal = (
                    "gradients are zeroed after their backward pass and computed anew before the optimizer steps, as a "
                    "closure that runs several times and SAM do"
                )

    def _gradient_marks(self) -> list[tuple[int, int] | None]:
        """What changes whenever a gradient does: its identity, and the version of its memory."""
        grads = [p.grad for p in self._trainable]
        return [None if grad is None else (id(grad), _version(grad)) for grad in grads]

    def _reached(self) -> bool:
        """Whether the backward pass that just ended added to this optimizer's gradients."""
        return self._gradient_marks() != self._marks_before

    def _was_changed(self) -> bool:
        """Whether the gradients were zeroed, clipped or replaced since the last backward pass that reached them."""
        return self._gradient_marks() != self._marks


def _version(tensor: Tensor) -> int:
    local = getattr(tensor, "_local_tensor", tensor)
    assert isinstance(local, torch.Tensor)
    return local._version
