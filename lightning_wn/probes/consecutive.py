"""Probe: one gradient sample is one optimizer step's gradient, beside the one before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.samples import GradientSamples
from lightning_wn.probes.base import SAME_EXAMPLES, sample_sizes
from lightning_wn.probes.checks.edits import with_deviation
from lightning_wn.probes.requirements import require_one_device
from lightning_wn.probes.whole_gradient import WholeGradientProbe
from lightning_wn.summing import summing_dtype
from lightning_wn.trainer import epoch_has_same_examples

_TOO_MANY = 3
"""Pairs of other parameters than each other's, beyond the pairs of the same, that make the probe give up."""


class ConsecutiveProbe(WholeGradientProbe):
    """Compares each optimizer step's gradient with a kept copy of the last one.

    It needs no second micro-batch and no per-example gradients, so it works on one device without
    accumulation for any layer, BatchNorm included, at the price of one gradient's memory. The parameters
    move between the two steps, which lowers the product of the two mean gradients: |G|² comes out too small
    and the noise scale too large, the more so the larger the learning rate. Estimates are approximate.

    With every optimizer step measured, successive pairs share a gradient; otherwise pairs are separate.
    """

    name = "consecutive"
    approximate = (
        "it compares gradients of two successive optimizer steps, and the parameters move between them; "
        "`Trainer(accumulate_grad_batches=2)` or more is exact"
    )

    def __init__(self) -> None:
        super().__init__()
        self._step = -1
        self._last: _Kept | None = None
        self._ends_pair = False
        self._surplus = 0

    def require_readable(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        """Raise ValueError on several devices, where exact probes exist."""
        require_one_device(trainer, self.name)

    def is_due(self, step: int, every_n_steps: int) -> bool:
        """Whether this optimizer step's gradient is kept or compared."""
        return step % every_n_steps in (0, 1 % every_n_steps)

    def begin(self, step: int, every_n_steps: int, model: nn.Module, measured: MeasuredParameters) -> None:
        """Start a step; a kept gradient of another step or of other parameters is dropped."""
        unchanged = measured is self._measured
        # beyond a cadence of one, pairs are separate
        starts_pair = every_n_steps > 1 and step % every_n_steps == 0
        # the same step again is a step that starts over
        if starts_pair or step - self._step not in (0, 1) or not unchanged:
            self._last = None
        self._ends_pair = every_n_steps > 1 and not starts_pair
        if isinstance(model, LightningModule) and epoch_has_same_examples(model.trainer, 1):
            self.refusal = SAME_EXAMPLES
        self._start_step(measured)
        self._step = step

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Compare with the kept gradient, if it is the last step's, and keep this one."""
        self._edits.detach()
        gradients = [p.grad for p in self._measured.parameters]
        if not self._micro_batches or self.refusal or self.refuses_sparse(gradients):
            return None
        measured, dtype = self._measured, summing_dtype(self._measured.device)
        scale, deviation = self._unedited(grad_scale, dtype)
        sq_norm = measured.sq_norms_of_optimizers_gradient(scale)
        last = self._last
        if last is not None and [g is None for g in last.gradients] != [g is None for g in gradients]:
            last = None
            self._note_turns(1)
        elif last is not None:
            self._note_turns(-1)
        samples = None
        if last is not None:
            # with the optimizer's present denominator, where there is one
            last_sq_norm = measured.sq_norms_of(last.gradients, last.scale) if measured.denominator else last.sq_norm
            # the kept copy becomes the sum of both, which takes no further memory
            for kept, gradient in _pairs(last.gradients, gradients):
                kept.mul_(last.scale.to(kept)).add_(gradient * scale.to(gradient))
            samples = GradientSamples(
                sq_norms=torch.stack((last_sq_norm, sq_norm)),
                sizes=sample_sizes((last.size, self._size), measured.device, dtype),
                weights=(1.0, 1.0),
                grad_sq_norm=measured.sq_norms_of(last.gradients, torch.tensor(0.5, dtype=dtype)),
                examples=self._size,
                micro_batches=self._micro_batches,
                counted=last.size + self._size,
                parts=2 * self._micro_batches,
                full=full,
            )
            samples = with_deviation(samples, torch.maximum(deviation, last.deviation))
        if self._ends_pair:
            self._last = None
            return samples
        if last is None:
            copies = [None if gradient is None else gradient.detach().clone() for gradient in gradients]
        else:
            copies = last.gradients
            for copy, gradient in _pairs(copies, gradients):
                copy.copy_(gradient)
        self._last = _Kept(copies, scale, sq_norm, self._size, deviation)
        return samples

    def _note_turns(self, surplus: int) -> None:
        """Count the pairs that cannot be compared against those that can."""
        self._surplus += surplus
        if self._surplus >= _TOO_MANY:
            self.refusal = (
                "layers take turns: two successive steps have gradients of other parameters, which cannot be compared"
            )

    def detach(self) -> None:
        """Forget the kept gradient and the step."""
        super().detach()
        self._last = None
        self._step = -1


@dataclass(frozen=True)
class _Kept:
    """The last step's gradient as the optimizer held it; ``scale`` makes it the mean gradient, as it was unedited."""

    gradients: list[Tensor | None]
    scale: Tensor
    sq_norm: Tensor
    size: float | Tensor
    deviation: Tensor


def _pairs(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in zip(left, right, strict=True):
        if one is not None and other is not None:
            yield one, other
