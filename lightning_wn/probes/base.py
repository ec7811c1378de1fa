"""What a probe is: it turns one optimizer step into gradient samples."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_wn.noise_scale.batch_counting import BatchCount
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.norms import require_dense
from lightning_wn.noise_scale.samples import GradientSamples

SAME_EXAMPLES = "every batch holds the same examples, so that two of them are no two samples"
"""Why batches cannot be compared where one is all that an epoch has."""


class CannotMeasureError(ValueError):
    """A probe cannot read this run; the message is the true cause, in a sentence."""


class Probe:
    """Collects the gradient samples of one optimizer step while the ordinary passes run.

    The callback calls ``require_readable`` before training, and then, for each step that is measured,
    ``begin`` once, ``before_forward``, ``before_backward`` and ``after_backward`` for every micro-batch, and
    ``finish`` once the optimizer's gradient is complete. ``detach`` may come at any time and leaves nothing
    behind. A probe says only where it is other than what stands here.
    """

    name: ClassVar[str]
    default_every_n_steps: ClassVar[int] = 10
    """Cadence at which measuring adds about 1 % or less to training time."""
    approximate: ClassVar[str] = ""
    """Why the estimate is approximate, in a sentence; empty for exact probes."""
    can_precondition: ClassVar[bool] = True
    """Whether it has whole gradients of parameters, to divide them by an optimizer's denominator."""
    watches_forward: ClassVar[bool] = False
    """Whether it has to see the forward pass, so that a step cannot begin after it."""
    watches_backward: ClassVar[bool] = True
    """Whether it has to see each backward pass; otherwise the optimizer's gradient tells all."""

    strict: bool = True
    """Whether what it finds unmeasurable at first is an error; otherwise it says so in ``refusal``."""
    refusal: str = ""
    """Why it cannot go on in this run, in a sentence with the cause: another probe had better take over."""
    num_left_out: int = 0
    """Measured optimizer steps that it could not read."""
    optimizer: Optimizer | None = None
    """Whose gradients it reads."""
    step_of_batch: int = 1
    """Which step of this optimizer on the present batch is under way, where one batch has several."""

    batch_dims: Mapping[str, int | Literal["folded"]] = {}
    """Where modules have the batch in another dimension than the first; see :class:`~.per_example.PerExampleNorms`."""

    loss_is_sum: bool = False
    """Whether losses are sums over what is counted; only who reads nothing but the optimizer's gradient needs it."""

    coverage: float = 1.0
    """Measured share of the elements of the parameters that it was given."""
    unchecked: str = ""
    """Why it is not known whether examples mix, where that matters and could not be looked at."""
    reduces_in_low_precision: bool = False
    """Whether gradients are rounded to 16 bits between the samples and the optimizer."""

    def require_readable(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        """Raise ValueError, with a sentence that names the fix, where this probe would not be right.

        Called early, and again when the strategy has wrapped the model and the optimizer exists.
        """

    def is_due(self, step: int, every_n_steps: int) -> bool:
        """Whether this optimizer step takes part in a measurement, at one measurement in so many steps."""
        return step % every_n_steps == 0

    def begin(self, step: int, every_n_steps: int, model: nn.Module, measured: MeasuredParameters) -> None:
        """Start an optimizer step over these parameters; an unfinished one is forgotten.

        The same object stands for the same parameters: hooks are set anew only for another one.
        """

    @property
    def waits_for_batch(self) -> bool:
        """Whether it has to see the next batch, measured or not."""
        return False

    def see_batch(
        self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int, count: BatchCount
    ) -> GradientSamples | None:
        """See a batch before ``training_step`` gets it: one of a measured step, or one that the probe waits for.

        Returns:
            The samples of an optimizer step that ended before, if this batch completes them.
        """
        return None

    def before_forward(self, count: BatchCount) -> None:
        """A micro-batch of so many examples starts its forward pass."""

    def before_backward(self, loss: Tensor | None = None) -> None:
        """The backward pass of this loss, as it is differentiated, starts."""

    def end_backward(self) -> None:
        """A backward pass ended, whether or not it counts as a micro-batch of its own."""

    def after_backward(self, size: float | Tensor, weight: float, loss_scale: Tensor | None) -> None:
        """A backward pass ended, of a loss that is a mean over ``size`` and was multiplied by ``weight``."""

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Read the optimizer's gradient and return the samples, or None if there is nothing to measure."""
        raise NotImplementedError

    def refuses_sparse(self, gradients: Iterable[Tensor | None]) -> bool:
        """Whether one of the gradients is sparse, which no probe reads.

        Raises:
            ValueError: Then, if the probe is strict.
        """
        sparse = next((g for g in gradients if g is not None and g.layout is not torch.strided), None)
        if sparse is None:
            return False
        try:
            require_dense(sparse)
        except ValueError as error:
            if self.strict:
                raise
            self.refusal = self.refusal or str(error)
        return True

    def detach(self) -> None:
        """Remove all hooks and forget the step."""


def same_parameters(new: Sequence[nn.Parameter], old: Sequence[nn.Parameter]) -> bool:
    """Whether these are the very same parameters in the same order; comparing values would wait for the device."""
    return len(new) == len(old) and all(map(operator.is_, new, old))


def mean_scale(weight: float | Tensor, grad_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what makes the weighted mean of the samples of ``Parameter.grad``, whose weights add up to ``weight``.

    Args:
        weight: Σ w_k of the gradients g_k that add up to Σ w_k g_k.
        grad_scale: A loss scaler's factor that they still have, or None.
        dtype: Of the result.
    """
    factor = 1.0 / weight
    return torch.as_tensor(factor, dtype=dtype) if grad_scale is None else factor / grad_scale.to(dtype)


def sample_sizes(sizes: Sequence[float | Tensor], device: torch.device, dtype: torch.dtype) -> Sequence[float] | Tensor:
    """Return the examples behind each sample as numbers, or as a tensor where some were counted on the device."""
    if any(isinstance(size, Tensor) for size in sizes):
        return torch.stack([torch.as_tensor(size, device=device, dtype=dtype) for size in sizes])
    return [float(size) for size in sizes]
