"""Probe: two gradient samples are two whole batches at the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_wn.noise_scale.batch_counting import BatchCount
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters, are_lazy
from lightning_wn.noise_scale.samples import GradientSamples
from lightning_wn.probes.base import SAME_EXAMPLES, CannotMeasureError, mean_scale, sample_sizes
from lightning_wn.probes.checks.edits import with_deviation
from lightning_wn.probes.requirements import require_one_device
from lightning_wn.probes.silent_copy import SilentCopy
from lightning_wn.probes.whole_gradient import WholeGradientProbe
from lightning_wn.summing import summing_dtype
from lightning_wn.trainer import epoch_has_same_examples

_Result = TypeVar("_Result")

_MAX_TRIES = 32
"""Batches after which an optimizer that does not step on any of them is given up."""
_ALTERNATIVES = (
    "`Trainer(accumulate_grad_batches=2)` or more measures any model exactly, and `probe='consecutive'` approximately"
)


class BatchPairProbe(WholeGradientProbe):
    """Takes the next batch's gradient at the present weights, too, on a copy of the model.

    Whatever happens inside a batch (batch statistics, contrastive losses, message passing, mixup), two batches are two
    independent samples. So nothing is asked of the layers or of the loss, and the number is exact for gradients of
    batches of the size in use. The second batch is the next one, and not the last: training has followed the last
    batch's gradient already, so that at the present weights it is smaller than, and no longer independent of,
    a fresh one's, in proportion to the learning rate.

    What other callbacks after this one do to a batch in ``on_train_batch_start`` is not done to the second batch.

    A measured step costs a copy of the model and a further pass forward and back, when the next batch comes. Training
    is the same: see :class:`~.silent_copy.SilentCopy`.

    One device. With accumulation the two samples are an optimizer step's gradient and the next micro-batch's, of their
    sizes; by hand there is one batch a step.
    """

    name = "batch_pair"
    # a measured step costs about two plain ones
    default_every_n_steps = 100

    def __init__(self) -> None:
        super().__init__()
        self._model: LightningModule | None = None
        self._batch_idx = 0
        self._pending: _Pending | None = None
        self._num_measured = 0
        self._warned = False
        self._failure: str | None = None

    def require_readable(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        """Raise ValueError on several devices, and for models that cannot be copied or read their own batches."""
        require_one_device(trainer, self.name)
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "`probe='batch_pair'` needs the batch before `training_step` does, and "
                f"{type(pl_module).__name__}.training_step takes `dataloader_iter`; let it take `batch`."
            )
        if wrapped and not are_lazy(pl_module.parameters()):
            try:
                SilentCopy(trainer, pl_module).free()
            except CannotMeasureError as error:
                raise CannotMeasureError(f"`probe='batch_pair'`: {error}; {_ALTERNATIVES}.") from error

    def begin(self, step: int, every_n_steps: int, model: nn.Module, measured: MeasuredParameters) -> None:
        """Start a step; a pair whose second batch is still to come stays."""
        assert isinstance(model, LightningModule)
        self._model = model
        self._start_step(measured)

    @property
    def waits_for_batch(self) -> bool:
        """Whether a measured step's second batch is still to come."""
        return self._pending is not None

    def see_batch(
        self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int, count: BatchCount
    ) -> GradientSamples | None:
        """Take this batch's gradient at the weights of the step that waits for it."""
        pending, self._batch_idx = self._pending, batch_idx
        if pending is None:
            return None
        samples = self._try(lambda: pending.with_batch(batch, count.total))
        if samples is None and self._failure is None:
            # `training_step` skipped the batch, or the optimizer's turn has not come
            pending.tries += 1
            if pending.tries < _MAX_TRIES:
                return None
            self._forget_pair()
            self._leave_out(f"on {_MAX_TRIES} batches one after the other the optimizer did not step again")
        self._forget_pair()
        self._num_measured += samples is not None
        return samples

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Keep the optimizer's gradient, and a copy of the model as it is now, until the next batch comes."""
        self._edits.detach()
        # an optimizer that steps several times on a batch: the first pair is still to come
        if not self._micro_batches or self._pending is not None:
            return None
        if self.refuses_sparse(p.grad for p in self._measured.parameters):
            return None
        model = self._model
        assert model is not None
        if epoch_has_same_examples(model.trainer, self._micro_batches):
            self._leave_out(SAME_EXAMPLES)
            return None
        if self._micro_batches > 1 and not model.automatic_optimization:
            # one batch alone does not let such a copy's optimizer step
            self._leave_out("gradients of several batches are accumulated by hand: use `probe='micro_batch'`")
            return None
        self._pending = self._try(lambda: self._keep(model, grad_scale, full=full))
        return None

    def detach(self) -> None:
        """Remove the hooks and forget the step, and a pair whose second batch did not come."""
        super().detach()
        self._model = None
        self._forget_pair()

    def _forget_pair(self) -> None:
        if self._pending is not None:
            self._pending.model.free()
        self._pending = None

    def _keep(self, model: LightningModule, grad_scale: Tensor | None, *, full: bool) -> _Pending:
        measured = self._measured
        gradients = [p.grad for p in measured.parameters]
        scale, deviation = self._unedited(grad_scale, summing_dtype(measured.device))
        copied = SilentCopy(model.trainer, model)
        denominators = None
        if measured.denominator is not None:
            # the optimizer's, before this gradient enters it
            denominators = {id(p): measured.denominator(p) for p in measured.parameters}
        return _Pending(
            model=copied,
            measured=MeasuredParameters(
                measured.parameters,
                groups=measured.groups,
                denominator=None if denominators is None else lambda p: denominators[id(p)],
                coverage=measured.coverage,
            ),
            gradients=[None if gradient is None else gradient.detach().clone() for gradient in gradients],
            scale=scale,
            deviation=deviation,
            size=self._size,
            micro_batches=self._micro_batches,
            full=full,
            batch_idx=self._batch_idx,
            optimizer=self.optimizer,
            step_of_batch=self.step_of_batch,
            loss_is_sum=self.loss_is_sum,
        )

    def _try(self, call: Callable[[], _Result]) -> _Result | None:
        """Call, and leave the step out where that cannot be; what cannot be at first is an error."""
        self._failure = None
        try:
            return call()
        except torch.OutOfMemoryError:
            self._failure = "the device has no memory left for a copy of the model and one more gradient"
        except CannotMeasureError as error:
            self._failure = str(error)
        # outside of the handler, whose error holds on to the memory
        self._leave_out(self._failure)
        return None

    def _leave_out(self, cause: str) -> None:
        self.num_left_out += 1
        if self.strict and not self._num_measured:
            self.detach()
            raise CannotMeasureError(f"`probe='batch_pair'`: {cause}; {_ALTERNATIVES}.")
        if self.num_left_out > self._num_measured:
            self.refusal = cause
        elif not self._warned:
            self._warned = True
            rank_zero_warn(f"`probe='batch_pair'` leaves out steps, and says so once: {cause}.")


@dataclass
class _Pending:
    """A measured step whose second batch is still to come; ``scale`` makes of the gradients the mean gradient."""

    model: SilentCopy
    measured: MeasuredParameters
    gradients: list[Tensor | None]
    scale: Tensor
    deviation: Tensor
    size: float | Tensor
    micro_batches: int
    full: bool
    batch_idx: int
    optimizer: Optimizer | None
    step_of_batch: int
    loss_is_sum: bool
    tries: int = field(default=0)

    def with_batch(self, batch: Any, size: float | Tensor) -> GradientSamples | None:
        """Return both batches' samples, or None if this batch gives no gradient."""
        measured = self.measured
        # as `batch_idx` goes, so may the optimizers take turns
        found = self.model.gradients(
            measured.parameters, batch, self.batch_idx, optimizer=self.optimizer, step=self.step_of_batch
        )
        if found is None:
            return None
        others, loss_scale = found
        dtype = summing_dtype(measured.device)
        other_scale = mean_scale(size if self.loss_is_sum else 1.0, loss_scale, dtype)
        sq_norms = torch.stack(
            (measured.sq_norms_of(self.gradients, self.scale), measured.sq_norms_of(others, other_scale))
        )
        total = [
            _sum(gradient, self.scale, other, other_scale)
            for gradient, other in zip(self.gradients, others, strict=True)
        ]
        samples = GradientSamples(
            sq_norms=sq_norms,
            sizes=sample_sizes((self.size, size), measured.device, dtype),
            weights=(1.0, 1.0),
            grad_sq_norm=measured.sq_norms_of(total, torch.tensor(0.5, dtype=dtype)),
            examples=self.size,
            counted=self.size + size,
            parts=self.micro_batches + 1,
            micro_batches=self.micro_batches,
            full=self.full,
        )
        return with_deviation(samples, self.deviation)


def _sum(one: Tensor | None, scale: Tensor, other: Tensor | None, other_scale: Tensor) -> Tensor | None:
    """Add two gradients into the first; what is None is zero."""
    if one is not None:
        one.mul_(scale.to(one))
    if other is None:
        return one
    scaled = other * other_scale.to(other)
    return scaled if one is None else one.add_(scaled)
