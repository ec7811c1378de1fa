"""What the probes have in common that compare the optimizer's whole gradient with another one."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.probes.base import Probe, mean_scale
from lightning_wn.probes.checks.edits import EditWatch


class WholeGradientProbe(Probe):
    """Notes what the optimizer's gradient is a mean over, and whether somebody edits it after the backward passes."""

    watches_backward = False

    def __init__(self) -> None:
        self._forget_parameters()

    def _forget_parameters(self) -> None:
        self._measured = MeasuredParameters(())
        self._edits = EditWatch(())
        self._forget_step()

    def _forget_step(self) -> None:
        self._size: float | Tensor = 0.0
        self._weight: float | Tensor = 0.0
        self._loss_scale: Tensor | None = None
        self._micro_batches = 0

    def _start_step(self, measured: MeasuredParameters) -> None:
        if measured is not self._measured:
            self._edits.detach()
            self._measured, self._edits = measured, EditWatch(measured.parameters)
        self._edits.start_step()
        self._forget_step()

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Watch what this backward pass gives."""
        self._edits.attach()

    def end_backward(self) -> None:
        """Watch nothing that is differentiated between backward passes."""
        self._edits.detach()

    def after_backward(self, size: float | Tensor, weight: float, loss_scale: Tensor | None) -> None:
        """Note what the gradient of one micro-batch is a mean over, and what it was multiplied with."""
        self._size = self._size + size
        self._weight = self._weight + (size * weight if self.loss_is_sum else weight)
        self._loss_scale = loss_scale
        self._micro_batches += 1

    def _unedited(self, grad_scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what makes the mean gradient of ``Parameter.grad``, and how far that was edited, relatively."""
        factor, deviation = self._edits.compare(dtype)
        if factor is None:  # no backward pass was seen
            return mean_scale(self._weight, grad_scale, dtype), deviation
        # rescaled as a whole, as by clipping: the gradient as it was before
        return mean_scale(self._weight, self._loss_scale, dtype).to(factor) / factor, deviation

    def detach(self) -> None:
        """Remove the hooks and forget the step."""
        self._edits.detach()
        self._forget_parameters()
