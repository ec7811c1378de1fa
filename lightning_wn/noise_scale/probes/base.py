"""What a probe is: it turns one optimizer step into gradient samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn

from lightning_wn.noise_scale.samples import GradientSamples


class Probe(Protocol):
    """Collects the gradient samples of one optimizer step while the ordinary backward passes run.

    The callback calls, for each step that is measured, ``begin`` once, then ``before_backward`` and
    ``after_backward`` around every backward pass, then ``finish`` once the optimizer's gradient is
    complete; ``detach`` may come at any time and leaves nothing behind.
    """

    name: ClassVar[str]
    default_every_n_steps: ClassVar[int]
    """Cadence at which measuring adds about 1 % or less to training time."""

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Start a step over these parameters; whatever was collected before is forgotten."""

    def before_backward(self) -> None:
        """A backward pass starts."""

    def after_backward(self, size: float | Tensor, weight: float, loss_scale: Tensor | None) -> None:
        """A backward pass ended, of a loss that is a mean over ``size`` and was multiplied by ``weight``."""

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Read the optimizer's gradient and return the samples, or None if there was no backward pass."""

    def detach(self) -> None:
        """Remove all hooks and forget the step."""
