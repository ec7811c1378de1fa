"""A factor on the learning rate that only the optimizer's step sees."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class ScaledLearningRate:
    """Multiplies the learning rates of all groups just before the update and puts them back right after it.

    Schedulers, loggers and checkpoints read ``group["lr"]`` between steps and never see the factor. Lightning runs
    the forward and backward pass inside ``optimizer.step(closure)``, except where a gradient scaler calls the step
    afterwards, or not at all: so the rates are changed when both the step has begun and the gradient is ready.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.factor = 1.0
        self._optimizer = optimizer
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # an optimizer whose step calls that of its base class runs the hooks of both
        self._depth = 0
        self._is_ready = False
        self._own: list[tuple[dict[str, Any], Any]] = []

    @property
    def in_step(self) -> bool:
        """Whether the optimizer's step has begun and not ended."""
        return self._depth > 0

    def gradient_is_ready(self) -> None:
        """Say that what the step will use is there."""
        self._is_ready = True
        if self.in_step:
            self._scale()

    def detach(self) -> None:
        """Put the learning rates back, also in the middle of a step that failed, and leave no hook behind."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._is_ready:
            self._scale()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if not self.in_step:
            self._restore()

    def _scale(self) -> None:
        if self._own or self.factor == 1.0:
            return
        for group in self._optimizer.param_groups:
            rate = group["lr"]
            if isinstance(rate, Tensor):  # a captured or compiled step holds on to it
                self._own.append((group, rate.clone()))
                rate.mul_(self.factor)
            else:
                self._own.append((group, rate))
                group["lr"] = rate * self.factor

    def _restore(self) -> None:
        self._depth = 0
        self._is_ready = False
        for group, rate in self._own:
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self._own = []
