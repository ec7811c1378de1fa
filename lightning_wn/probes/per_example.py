"""Probe: one gradient sample is one example."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_wn.noise_scale.batch_counting import BatchCount
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters, are_lazy
from lightning_wn.noise_scale.samples import NUM_CHECKSUMS, GradientSamples
from lightning_wn.per_example.engine.gradient_blocks import Elements
from lightning_wn.per_example.engine.norms import PerExampleNorms
from lightning_wn.per_example.rules.errors import MixedExamplesError, PerExampleError
from lightning_wn.probes.base import Probe, mean_scale
from lightning_wn.probes.checks.mixing import MixingCheck
from lightning_wn.probes.requirements import require_one_device
from lightning_wn.summing import summing_dtype

_Result = TypeVar("_Result")

# torch's own gradient of LayerNorm in bfloat16 is 1 to 3 % off on a CPU
_ROUNDED = 0.2

_ALTERNATIVES = (
    "`Trainer(accumulate_grad_batches=2)` or more measures any model exactly, and so does `probe='batch_pair'`."
)


class PerExampleProbe(Probe):
    """Takes every example's own squared gradient norm out of the ordinary backward pass.

    With B_small = 1 the variance of tr(Σ) is the lowest that a batch can give. One device, layers that do not
    mix examples. What cannot be measured exactly is an error at the first measured step; if it first shows
    later, that step is left out with a warning.
    """

    name = "per_example"
    # a measured step costs about 1.3 plain ones
    default_every_n_steps = 100
    watches_forward = True

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._measured = MeasuredParameters(())
        self._norms: PerExampleNorms | None = None
        self._num_measured = self._num_refused = 0
        self._warned = False
        self._mixing = MixingCheck()
        self._forget_step()

    def _forget_step(self) -> None:
        self._failed = False
        self._by_example: Tensor | None = None
        self._sq_norms: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._examples: float | Tensor = 0.0
        self._total_weight = 0.0
        self._elements: list[Elements] = []

    def require_readable(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        """Raise ValueError on several devices and for models that mix examples or are compiled."""
        require_one_device(trainer, self.name)
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"`probe='per_example'` follows one backward pass through the whole model, and this run has "
                f"{len(trainer.optimizers)} optimizers; use `probe='batch_pair'`, or `probe='auto'`, which takes it."
            )
        if wrapped and not are_lazy(pl_module.parameters()):
            self._attach(pl_module, MeasuredParameters([p for p in pl_module.parameters() if p.requires_grad]))
            self.detach()

    def begin(self, step: int, every_n_steps: int, model: nn.Module, measured: MeasuredParameters) -> None:
        """Start a step; the hooks are set anew only where the parameters changed."""
        if self._norms is None or model is not self._model or measured is not self._measured:
            self.detach()
            self._attach(model, measured)
        if self._norms is not None:
            self._norms.blocks.next_step()
        self._forget_step()

    def see_batch(
        self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int, count: BatchCount
    ) -> None:
        """Keep what a look at whether examples mix needs."""
        self._mixing.see_batch(trainer, model, batch, batch_idx)

    def before_forward(self, count: BatchCount) -> None:
        """Record this micro-batch's layers."""
        self._by_example = count.by_example
        self._try(lambda norms: norms.before_forward(_examples_in(count)))

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Let the rules look at the graph of the loss."""
        if loss is not None:
            wide = summing_dtype(loss.device)
            counts = None if self._by_example is None else self._by_example.to(loss.device, wide)
            shares = None if counts is None else counts.clamp_min(0) / counts.clamp_min(0).sum()
            self._try(lambda norms: norms.before_backward(loss, shares))

    def after_backward(self, size: float | Tensor, weight: float, loss_scale: Tensor | None) -> None:
        """Close one micro-batch: the loss was ``weight * loss_scale`` times a mean over what is counted.

        An example that counts n_i of n has n_i / n of the weight; what it adds to the gradient is that share of its own
        mean gradient, and one that counts nothing adds nothing.
        """
        sq_norms = self._try(self._norms_of_examples)
        if sq_norms is None:
            return
        assert self._norms is not None
        assert self._norms.elements is not None
        device = sq_norms.device
        dtype = summing_dtype(device)
        unscale = 1.0 if loss_scale is None else 1.0 / loss_scale.to(dtype)
        self._elements.append(self._norms.elements.scaled(unscale))
        scale = weight if loss_scale is None else weight * loss_scale.to(dtype)
        counts = torch.ones(len(sq_norms), device=device, dtype=dtype)
        if self._by_example is not None:
            counts = self._by_example.to(device, dtype)
        counted = counts > 0
        share = counts / counts.sum()
        own = torch.where(counted, 1.0 / (share * scale), 0.0).square()
        self._sq_norms.append(sq_norms.to(dtype) * own.reshape(-1, *[1] * (sq_norms.ndim - 1)))
        self._sizes.append(torch.where(counted, counts, 1.0))
        self._weights.append(weight * share)
        self._examples = self._examples + size
        self._total_weight += weight

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Take the norm of the optimizer's gradient over the measured parameters."""
        if self._failed or not self._weights or self._norms is None:
            return None
        if self.refuses_sparse(p.grad for p in self._measured.parameters):
            return None
        dtype = self._sq_norms[0].dtype
        scale = mean_scale(self._total_weight, grad_scale, dtype)
        if sum(map(len, self._sizes)) < 2:
            self._note(PerExampleError("an optimizer step of one example has a single gradient sample"))
        else:
            self._num_measured += 1
        gradient = self._norms.blocks.of_gradient(self._sq_norms[0].device)
        unscale = 1.0 if grad_scale is None else 1.0 / grad_scale.to(gradient)
        factor, difference = self._norms.blocks.compare(reduce(operator.add, self._elements), gradient * unscale)
        # the parameters have been compared one by one: what is left is one number for all samples
        count = sum(map(len, self._sq_norms))
        checksums = torch.zeros(count, NUM_CHECKSUMS, device=difference.device, dtype=dtype)
        checksums[:, 0] = difference * (_ROUNDED if self._is_rounded() else 1.0)
        return GradientSamples(
            sq_norms=torch.cat(self._sq_norms),
            sizes=torch.cat(self._sizes),
            weights=torch.cat(self._weights),
            grad_sq_norm=self._measured.sq_norms_of_optimizers_gradient(scale.to(factor.device) / factor),
            checksums=checksums,
            checksum_sizes=torch.ones_like(checksums),
            grad_checksums=torch.zeros_like(checksums[0]),
            examples=self._examples,
            micro_batches=len(self._sq_norms),
            full=full,
        )

    def detach(self) -> None:
        """Remove the hooks and forget the step."""
        if self._norms is not None:
            self._norms.detach()
        self._norms = None
        self._model = None
        self._measured = MeasuredParameters(())
        self._forget_step()

    def _attach(self, model: nn.Module, measured: MeasuredParameters) -> None:
        try:
            norms = PerExampleNorms(
                model,
                measured.parameters,
                batch_dims=self.batch_dims,
                groups=measured.groups,
                denominator=measured.denominator,
            )
            norms.attach()
        except PerExampleError as error:
            self._refuse(error)
            return
        self._norms, self._model, self._measured = norms, model, measured
        seen = sum(p.numel() for p in norms.parameters)
        self.coverage = seen / max(sum(p.numel() for p in measured.parameters), 1)

    def _norms_of_examples(self, norms: PerExampleNorms) -> Tensor:
        sq_norms = norms.after_backward()
        if norms.dims is not None:
            self._mixing.require_separate(len(sq_norms), norms.dims)
            self.unchecked = self._mixing.unchecked
        return sq_norms

    def _is_rounded(self) -> bool:
        """Whether layers compute in 16 bits and parameters do not: for these the limit allows for it already."""
        assert self._norms is not None
        return self._norms.low_precision and all(p.dtype.itemsize >= 4 for p in self._measured.parameters)

    def _try(self, call: Callable[[PerExampleNorms], _Result]) -> _Result | None:
        """Call the engine; what it refuses is an error at first, and a step left out later."""
        if self._failed or self._norms is None:
            return None
        try:
            return call(self._norms)
        except PerExampleError as error:
            self._failed = True
            self._refuse(error)
            self.num_left_out += 1
            return None

    def _refuse(self, error: PerExampleError) -> None:
        if self.strict and not self._num_measured:
            self.detach()
            raise ValueError(f"`probe='per_example'`: {error}. {_ALTERNATIVES}") from error
        self._note(error)

    def _note(self, error: PerExampleError) -> None:
        """Leave a step out; where those are the most, the run is not for this probe."""
        self._num_refused += 1
        if self._num_refused > self._num_measured or isinstance(error, MixedExamplesError):
            self.refusal = str(error)
        elif not self._warned:
            self._warned = True
            rank_zero_warn(f"`probe='per_example'` leaves out steps, and says so once: {error}. {_ALTERNATIVES}")


def _examples_in(count: BatchCount) -> int:
    if count.by_example is not None:
        return len(count.by_example)
    if isinstance(count.total, Tensor) or count.total != int(count.total):
        raise PerExampleError(
            f"the number of examples in a batch is needed, and `batch_size_fn` gave {count.total!r}: return a whole "
            "number, or a tensor with what each example counts, as its tokens, `mask.sum(1)`"
        )
    return int(count.total)
