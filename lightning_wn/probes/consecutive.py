"""Probe: one gradient sample is one optimizer step's gradient, beside the one before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_wn.noise_scale.batch_counting import BatchCount
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.samples import GradientSamples
from lightning_wn.probes.base import Probe
from lightning_wn.summing import summing_dtype


class ConsecutiveProbe(Probe):
    """Compares each optimizer step's gradient with a kept copy of the last one.

    It needs no second micro-batch and no per-example gradients, so it works on one device without
    accumulation for any layer, BatchNorm included, at the price of one gradient's memory. The parameters
    move between the two steps, which lowers the product of the two mean gradients: |G|² comes out too small
    and the noise scale too large, the more so the larger the learning rate. Estimates are approximate.

    With every optimizer step measured, successive pairs share a gradient; otherwise pairs are separate.
    """

    name: ClassVar[str] = "consecutive"
    approximate: ClassVar[str] = (
        "it compares gradients of two successive optimizer steps, and the parameters move between them; "
        "`Trainer(accumulate_grad_batches=2)` or more is exact"
    )
    watches_backward: ClassVar[bool] = False

    def __init__(self) -> None:
        self._measured = MeasuredParameters(())
        self._step = -1
        self._size: float | Tensor = 0.0
        self._weight = 0.0
        self._micro_batches = 0
        self._last: _Kept | None = None
        self._ends_pair = False

    def require_readable(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        """Raise ValueError on several devices, where exact probes exist."""
        if trainer.world_size > 1:
            raise ValueError(
                f"`probe='consecutive'` is for one device, and this run has {trainer.world_size} ranks, whose "
                "gradients are exact samples; use `probe='auto'`."
            )

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
        self._measured = measured
        self._step = step
        self._size, self._weight, self._micro_batches = 0.0, 0.0, 0

    def before_forward(self, count: BatchCount) -> None:
        """Nothing to do: all is read at the end of the step."""

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Nothing to do: all is read at the end of the step."""

    def after_backward(self, size: float | Tensor, weight: float, loss_scale: Tensor | None) -> None:
        """Add the examples of one micro-batch."""
        self._size = self._size + size
        self._weight += weight
        self._micro_batches += 1

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Compare with the kept gradient, if it is the last step's, and keep this one."""
        if not self._weight:
            return None
        device = self._measured.device
        dtype = summing_dtype(device)
        factor = 1.0 / self._weight
        scale = torch.tensor(factor, dtype=dtype) if grad_scale is None else factor / grad_scale.to(dtype)
        parameters = self._measured.parameters
        present = [p.grad is not None for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        sq_norm = self._measured.sq_norms_of_optimizers_gradient(scale)
        samples = None
        if self._last is not None and self._last.present == present:
            last = self._last
            # with the optimizer's present denominator, where there is one
            last_sq_norm = self._sq_norms_of_kept(last, last.scale) if self._measured.denominator else last.sq_norm
            # the kept copy becomes the sum of both, which takes no further memory
            for kept, gradient in zip(last.gradients, gradients, strict=True):
                kept.mul_(last.scale.to(kept)).add_(gradient * scale.to(gradient))
            samples = GradientSamples(
                sq_norms=torch.stack((last_sq_norm, sq_norm)),
                sizes=_both(last.size, self._size, device, dtype),
                weights=(1.0, 1.0),
                grad_sq_norm=self._sq_norms_of_kept(last, torch.tensor(0.5, dtype=dtype)),
                examples=self._size,
                micro_batches=self._micro_batches,
                full=full,
            )
        self._last = None if self._ends_pair else self._keep(gradients, present, scale, sq_norm)
        return samples

    def detach(self) -> None:
        """Forget the kept gradient and the step."""
        self._measured = MeasuredParameters(())
        self._last = None
        self._step = -1

    def _sq_norms_of_kept(self, kept: _Kept, scale: Tensor) -> Tensor:
        gradients = iter(kept.gradients)
        return self._measured.sq_norms_of([next(gradients) if there else None for there in kept.present], scale)

    def _keep(self, gradients: list[Tensor], present: list[bool], scale: Tensor, sq_norm: Tensor) -> _Kept:
        if self._last is not None and self._last.present == present:
            copies = self._last.gradients
            for copy, gradient in zip(copies, gradients, strict=True):
                copy.copy_(gradient)
        else:
            copies = [gradient.detach().clone() for gradient in gradients]
        return _Kept(copies, present, scale, sq_norm, self._size)


@dataclass(frozen=True)
class _Kept:
    """The last step's gradient as the optimizer held it; ``scale`` makes it the mean gradient."""

    gradients: list[Tensor]
    present: list[bool]
    scale: Tensor
    sq_norm: Tensor
    size: float | Tensor


def _both(
    last: float | Tensor, this: float | Tensor, device: torch.device, dtype: torch.dtype
) -> Sequence[float] | Tensor:
    if isinstance(last, Tensor) or isinstance(this, Tensor):
        return torch.stack([torch.as_tensor(size, device=device, dtype=dtype) for size in (last, this)])
    return (last, this)
