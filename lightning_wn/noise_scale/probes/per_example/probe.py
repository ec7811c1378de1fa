"""Probe: one gradient sample is one example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_wn.noise_scale.probes.base import same_parameters
from lightning_wn.noise_scale.probes.micro_batch import foreach_norms
from lightning_wn.noise_scale.probes.per_example.engine import PerExampleNorms
from lightning_wn.noise_scale.probes.per_example.refusals import PerExampleError
from lightning_wn.noise_scale.samples import GradientSamples, summing_dtype

_Result = TypeVar("_Result")

_ALTERNATIVES = (
    "`Trainer(accumulate_grad_batches=2)` or more measures any model exactly, and `probe='consecutive'` approximately."
)


class PerExampleProbe:
    """Takes every example's own squared gradient norm out of the ordinary backward pass.

    With B_small = 1 the variance of tr(Σ) is the lowest that a batch can give. One device, layers that do not
    mix examples. What cannot be measured exactly is an error at the first measured step; if it first shows
    later, that step is left out with a warning.
    """

    name: ClassVar[str] = "per_example"
    # a measured step costs about 1.3 plain ones where all layers have rules, 1.7 with MultiheadAttention
    default_every_n_steps: ClassVar[int] = 100
    approximate: ClassVar[str] = ""
    reduces_in_low_precision: bool = False

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._parameters: tuple[nn.Parameter, ...] = ()
        self._norms: PerExampleNorms | None = None
        self._coverage = 1.0
        self._has_measured = False
        self._warned = False
        self._failed = False
        self._forget_step()

    @property
    def coverage(self) -> float:
        """Measured share of the trainable parameters' elements."""
        return self._coverage

    def require_readable(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        """Raise ValueError on several devices and for models that mix examples or are compiled."""
        if trainer.world_size > 1:
            raise ValueError(
                f"`probe='per_example'` is for one device, and this run has {trainer.world_size} ranks, whose "
                "gradients are exact samples; use `probe='auto'`."
            )
        if wrapped:
            self._attach(pl_module, [p for p in pl_module.parameters() if p.requires_grad])
            self.detach()

    def is_due(self, step: int, every_n_steps: int) -> bool:
        """Whether this optimizer step is measured."""
        return step % every_n_steps == 0

    def begin(self, step: int, every_n_steps: int, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Start a step; the hooks are set anew only where the parameters changed."""
        parameters = tuple(parameters)
        same = model is self._model and same_parameters(parameters, self._parameters)
        if self._norms is None or not same:
            self.detach()
            self._attach(model, parameters)
        self._forget_step()

    def before_forward(self, size: float | Tensor) -> None:
        """Record this micro-batch's layers."""
        if isinstance(size, Tensor) or size != int(size):
            raise ValueError(
                f"`probe='per_example'` needs the number of examples in a batch, got {size!r} from `batch_size_fn`; "
                f"return a whole number of examples. {_ALTERNATIVES}"
            )
        self._try(lambda norms: norms.before_forward(int(size)))

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Let the rules look at the graph of the loss."""
        if loss is not None:
            self._try(lambda norms: norms.before_backward(loss))

    def after_backward(self, size: float | Tensor, weight: float, loss_scale: Tensor | None) -> None:
        """Close one micro-batch: the loss was ``weight * loss_scale`` times a mean over its examples."""
        sq_norms = self._try(lambda norms: norms.after_backward())
        if sq_norms is None:
            return
        dtype = summing_dtype(sq_norms.device)
        count = len(sq_norms)
        factor = count / weight if loss_scale is None else count / (weight * loss_scale.to(dtype))
        self._sq_norms.append(sq_norms.to(dtype) * factor**2)
        self._weights += [weight / count] * count
        self._total_weight += weight
        self._micro_batches += 1

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Take the norm of the optimizer's gradient over the measured parameters."""
        if self._failed or not self._weights or self._norms is None:
            return None
        dtype, device = self._sq_norms[0].dtype, self._sq_norms[0].device
        factor = 1.0 / self._total_weight
        scale = torch.tensor(factor, dtype=dtype) if grad_scale is None else factor / grad_scale.to(dtype)
        grads = [p.grad for p in self._norms.parameters if p.grad is not None]
        norms = foreach_norms(grads)
        mean_norms = torch.stack(norms).to(dtype) * scale if norms else torch.zeros(1, device=device, dtype=dtype)
        self._has_measured = True
        return GradientSamples(
            sq_norms=torch.cat(self._sq_norms),
            sizes=[1.0] * len(self._weights),
            weights=self._weights,
            grad_sq_norm=mean_norms.square().sum(),
            micro_batches=self._micro_batches,
            full=full,
        )

    def detach(self) -> None:
        """Remove the hooks and forget the step."""
        if self._norms is not None:
            self._norms.detach()
        self._norms = None
        self._model = None
        self._parameters = ()
        self._forget_step()

    def _attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        try:
            norms = PerExampleNorms(model, parameters)
            norms.attach()
        except PerExampleError as error:
            raise ValueError(f"`probe='per_example'`: {error}. {_ALTERNATIVES}") from error
        self._norms, self._model, self._parameters = norms, model, tuple(parameters)
        self._coverage = norms.coverage

    def _try(self, call: Callable[[PerExampleNorms], _Result]) -> _Result | None:
        """Call the engine; what it refuses is an error at first, and a step left out later."""
        if self._failed or self._norms is None:
            return None
        try:
            return call(self._norms)
        except PerExampleError as error:
            self._failed = True
            if not self._has_measured:
                self.detach()
                raise ValueError(f"`probe='per_example'`: {error}. {_ALTERNATIVES}") from error
            if not self._warned:
                self._warned = True
                rank_zero_warn(f"`probe='per_example'` left out a step, and will say so once: {error}. {_ALTERNATIVES}")
            return None

    def _forget_step(self) -> None:
        self._failed = False
        self._sq_norms: list[Tensor] = []
        self._weights: list[float] = []
        self._total_weight = 0.0
        self._micro_batches = 0
