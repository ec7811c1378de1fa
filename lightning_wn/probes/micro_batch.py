"""Probe: one gradient sample is one rank's one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.norms import norm_dtype
from lightning_wn.noise_scale.samples import GradientSamples
from lightning_wn.probes.base import Probe, mean_scale, sample_sizes
from lightning_wn.probes.checks.checksums import Projection, choose_projections, project
from lightning_wn.probes.requirements import require_independent_ranks
from lightning_wn.summing import summing_dtype
from lightning_wn.trainer import largest_accumulation


class MicroBatchProbe(Probe):
    """Sees each micro-batch's local gradient before accumulation and before DDP averages it.

    ``Tensor.register_hook`` on every parameter is called with the gradient of the running backward pass
    alone. Its norm is taken at once, while it is in the cache, and nothing is kept. The mean of the
    samples is the gradient that the optimizer is about to use, so its norm comes from ``Parameter.grad``.

    The samples must be independent: layers that mix ranks (SyncBatchNorm) are refused by the callback.
    Whatever else stands between the samples and the optimizer's gradient (a lossy communication hook,
    local SGD, a gradient edited or left over) is found by comparing a few random projections of both.
    """

    name = "micro_batch"

    def __init__(self) -> None:
        self._measured = MeasuredParameters(())
        self._handles: list[RemovableHandle] = []
        self._projections: dict[int, Projection] = {}
        self._averaged: list[nn.Parameter] | None = None
        self._recording = False
        # of the running backward pass; the hooks hold on to these lists
        self._fired: list[int] = []
        self._norms: list[Tensor] = []
        self._preconditioned: list[Tensor] = []
        self._checks: list[tuple[Projection, Tensor]] = []
        self._forget_step()

    def require_readable(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        """Raise ValueError unless an optimizer step has two independent micro-batches."""
        # by hand anything may be accumulated
        if pl_module.automatic_optimization and trainer.world_size * largest_accumulation(trainer) < 2:
            raise ValueError(
                "`probe='micro_batch'` compares gradients over few and over many examples, and one device without "
                "gradient accumulation has one batch size only; set `Trainer(accumulate_grad_batches=2)` or more (4 is "
                "a good choice, with a loader batch size a quarter as large), train with DDP on two or more ranks, or "
                "use `probe='auto'`."
            )
        require_independent_ranks(trainer, pl_module, may_convert=True)
        if wrapped and trainer.world_size > 1:
            self._averaged = _averaged_by_ddp(trainer.strategy.model)

    def begin(self, step: int, every_n_steps: int, model: nn.Module, measured: MeasuredParameters) -> None:
        """Start a step; hooks are set anew only where the parameters changed."""
        if measured is not self._measured:
            self.detach()
            self._measured = measured
            self._projections = choose_projections(measured.parameters, self._averaged)
        if not self._handles:
            for index, parameter in enumerate(measured.parameters):
                handle = parameter.register_hook(self._hook(index, parameter))  # type: ignore[no-untyped-call]  # torch's
                self._handles.append(handle)
        self._forget_step()

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Record what the hooks see from here on."""
        self._forget_backward()
        self._recording = True

    def after_backward(self, size: float | Tensor, weight: float, loss_scale: Tensor | None) -> None:
        """Close one sample: its hooks saw ``weight * loss_scale`` times the micro-batch's mean gradient."""
        self._recording = False
        # the parts of a gradient that arrives twice in one pass cannot be told from two samples
        self._irregular |= len(set(self._fired)) < len(self._fired)
        device = self._measured.device
        dtype = summing_dtype(device)
        checksums, sizes = project(self._checks, device, dtype)
        factor = 1.0 / weight if loss_scale is None else 1.0 / (weight * loss_scale.to(dtype))
        squares = _squares(self._norms, factor, device, dtype)
        preconditioned = _squares(self._preconditioned, factor, device, dtype) if self._preconditioned else None
        self._sq_norms.append(self._measured.add_up(self._fired, squares, preconditioned))
        self._checksums.append(checksums * factor)
        self._checksum_sizes.append(sizes * factor)
        self._sizes.append(size)
        self._weights.append(weight)
        self._forget_backward()

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Take the norm of the optimizer's gradient, Σ w_k g_k averaged over ranks, over Σ w_k."""
        if not self._weights:
            return None
        device = self._sq_norms[0].device
        dtype = self._sq_norms[0].dtype
        scale = mean_scale(sum(self._weights), grad_scale, dtype)
        parameters = () if self.refuses_sparse(p.grad for p in self._measured.parameters) else self._measured.parameters
        grad_sq_norm = torch.zeros_like(self._sq_norms[0])
        if parameters:
            grad_sq_norm = self._measured.sq_norms_of_optimizers_gradient(scale)
        picks = [
            (projection, projection.pick(grad))
            for index, projection in self._projections.items()
            if parameters and (grad := parameters[index].grad) is not None
        ]
        samples = GradientSamples(
            sq_norms=torch.stack(self._sq_norms),
            sizes=sample_sizes(self._sizes, device, dtype),
            weights=self._weights,
            grad_sq_norm=grad_sq_norm,
            checksums=torch.stack(self._checksums),
            checksum_sizes=torch.stack(self._checksum_sizes),
            grad_checksums=project(picks, device, dtype)[0] * scale,
            full=full,
            irregular=self._irregular,
        )
        self._forget_step()
        return samples

    def detach(self) -> None:
        """Remove the hooks and forget the step."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._measured = MeasuredParameters(())
        self._projections = {}
        self._forget_step()

    def _forget_backward(self) -> None:
        for entries in (self._fired, self._norms, self._preconditioned, self._checks):
            entries.clear()

    def _forget_step(self) -> None:
        self._recording = False
        self._forget_backward()
        self._irregular = False
        self._sq_norms: list[Tensor] = []
        self._checksums: list[Tensor] = []
        self._checksum_sizes: list[Tensor] = []
        self._sizes: list[float | Tensor] = []
        self._weights: list[float] = []

    def _hook(self, index: int, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        # runs between the kernels of the backward pass with cold caches: every line here costs, so none does
        # what can be done before or after
        fired, norms, checks = self._fired, self._norms, self._checks
        projection = self._projections.get(index)
        vector_norm, dtype = torch.linalg.vector_norm, norm_dtype(parameter.dtype)
        measured, preconditioned = self._measured, self._preconditioned
        preconditions, strided = measured.denominator is not None, torch.strided

        def see_gradient(grad: Tensor) -> None:
            if self._recording:
                fired.append(index)
                if grad.layout is not strided:
                    # other ranks wait for this step's row, which leaves it out on all
                    self._irregular |= self.refuses_sparse([grad])
                    grad = torch.zeros(parameter.shape, device=grad.device, dtype=grad.dtype)
                norms.append(vector_norm(grad) if dtype is None else vector_norm(grad, dtype=dtype))
                if projection is not None:
                    checks.append((projection, projection.pick(grad)))
                if preconditions:
                    preconditioned.append(measured.preconditioned_norm(index, grad))

        return see_gradient


def _squares(norms: Sequence[Tensor], factor: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the squares of scalars times ``factor``, shape (n,)."""
    stacked = torch.stack(list(norms)) if norms else torch.zeros(0, device=device)
    return (stacked.detach().to(dtype) * factor).square()


def _averaged_by_ddp(wrapped: nn.Module | None) -> list[nn.Parameter] | None:
    """Return the parameters that DDP averages: those that are trainable when it wraps the model. None is all."""
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return None
    ignored = wrapped.parameters_to_ignore
    return [p for name, p in wrapped.module.named_parameters() if p.requires_grad and name not in ignored]
