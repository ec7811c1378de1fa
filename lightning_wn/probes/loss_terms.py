"""Probe: one gradient sample is one term of the loss, where one batch holds all data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_wn.noise_scale.batch_counting import BatchCount
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.samples import GradientSamples
from lightning_wn.per_example.rules.errors import batch_dependent_layers
from lightning_wn.probes.base import CannotMeasureError, Probe, mean_scale
from lightning_wn.probes.checks.edits import with_deviation
from lightning_wn.probes.requirements import require_one_device
from lightning_wn.probes.silent_copy import SilentCopy, copied_batch
from lightning_wn.summing import summing_dtype
from lightning_wn.text import some
from lightning_wn.trainer import epoch_has_same_examples

# scalars that are multiplied by constants on the way to the loss
_FACTORS = {"MulBackward0", "DivBackward0", "NegBackward0", "ToCopyBackward0", "ViewBackward0", "SqueezeBackward0"}
# what makes one number of many terms, each of which depends on one row of the operand alone
_MEANS = {
    "MeanBackward0", "SumBackward0", "NllLossBackward0", "MseLossBackward0", "L1LossBackward0",
    "SmoothL1LossBackward0", "HuberLossBackward0", "BinaryCrossEntropyBackward0",
    "BinaryCrossEntropyWithLogitsBackward0",
}  # fmt: skip

_MOST_TERMS = 512


class LossTermsProbe(Probe):
    """Differentiates each term of the loss by itself, on a copy of the model.

    Where one batch holds all data, as a whole graph does, there are no two batches to compare. What mixes examples in
    the network (message passing) is then the same in every step, and a term of the loss has a gradient of its own,
    whatever of the data it depends on. Their spread is that of steps whose loss takes some of the terms, drawn at
    random, while the forward pass sees all of the data: nodes of a graph that are drawn for the loss.

    One device; a measured step costs a copy of the model and a backward pass for each term, for 512 at most, which are
    drawn at random.
    """

    name = "loss_terms"
    default_every_n_steps = 100
    watches_backward = False

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._model: LightningModule | None = None
        self._measured = MeasuredParameters(())
        self._batch: Any = None
        self._batch_idx = self._step = 0
        self._size: float | Tensor = 0.0

    def require_readable(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        """Raise ValueError on several devices, and in manual optimization."""
        require_one_device(trainer, self.name)
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"`probe={self.name!r}` needs the loss that `training_step` returns, and "
                f"{type(pl_module).__name__} sets `automatic_optimization = False`; use `probe='batch_pair'`."
            )

    def begin(self, step: int, every_n_steps: int, model: nn.Module, measured: MeasuredParameters) -> None:
        """Start a step."""
        self._measured, self._step = measured, step
        self._size = 0.0

    def see_batch(
        self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int, count: BatchCount
    ) -> None:
        """Keep the batch as it is before ``training_step`` gets it."""
        self._trainer, self._model = trainer, model
        self._batch, self._batch_idx = copied_batch(batch), batch_idx

    def after_backward(self, size: float | Tensor, weight: float, loss_scale: Tensor | None) -> None:
        """Note what the loss is a mean over."""
        self._size = self._size + size

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Take the terms' gradients at the present weights, and compare their mean with the optimizer's gradient."""
        trainer, model = self._trainer, self._model
        if trainer is None or model is None or self.refuses_sparse(p.grad for p in self._measured.parameters):
            return None
        try:
            if not epoch_has_same_examples(trainer, 1):
                raise CannotMeasureError("batches differ from each other, and `probe='batch_pair'` compares them")
            return self._samples(trainer, model, grad_scale, full=full)
        except torch.OutOfMemoryError:
            cause = "the device has no memory left for a copy of the model and its loss"
        except CannotMeasureError as error:
            cause = str(error)
        self.num_left_out += 1
        if self.strict:
            raise CannotMeasureError(f"`probe={self.name!r}`: {cause}.")
        self.refusal = cause
        return None

    def detach(self) -> None:
        """Forget the step."""
        self._trainer = self._model = self._batch = None

    def _samples(
        self, trainer: Trainer, model: LightningModule, grad_scale: Tensor | None, *, full: bool
    ) -> GradientSamples:
        measured = self._measured
        if mixing := batch_dependent_layers(model):
            raise CannotMeasureError(
                f"{some(map(repr, mixing))} makes use of batch statistics, which fewer terms of the loss would change; "
                "smaller batches and `probe='batch_pair'` measure that"
            )
        copied = SilentCopy(trainer, model)
        parameters = copied.copies_of(measured.parameters)
        edge, seeds = _terms_of(copied.loss(self._batch, self._batch_idx))
        count = len(seeds)
        if float(self._size) != count:
            raise CannotMeasureError(
                f"the loss has {count} terms and a batch counts {float(self._size):g}; let `batch_size_fn` return the "
                "number of terms"
            )
        dtype = summing_dtype(measured.device)
        whole = torch.autograd.grad([edge], parameters, [seeds], retain_graph=True, allow_unused=True)
        # training must draw the same random numbers with and without a probe
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(self._step))[:_MOST_TERMS].tolist()
        rows: list[Tensor] = []
        for index in drawn:
            seed = torch.zeros_like(seeds)
            seed[index] = seeds[index]
            found = torch.autograd.grad([edge], parameters, [seed], retain_graph=True, allow_unused=True)
            rows.append(measured.sq_norms_of(found, torch.tensor(float(count), dtype=dtype)))
        copied.free()
        sq_norms = torch.stack(rows)
        samples = GradientSamples(
            # those that were not drawn count as the drawn ones do on average
            sq_norms=torch.cat(
                (sq_norms, sq_norms.mean(0, keepdim=True).expand(count - len(rows), *sq_norms.shape[1:]))
            ),
            sizes=[1.0] * count,
            weights=[1.0] * count,
            grad_sq_norm=measured.sq_norms_of(whole, torch.ones((), dtype=dtype)),
            micro_batches=1,
            full=full,
        )
        scale = mean_scale(1.0, grad_scale, dtype)
        return with_deviation(samples, _deviation(whole, [p.grad for p in measured.parameters], scale))


def _terms_of(loss: Tensor) -> tuple[GradientEdge, Tensor]:
    """Return where the terms of a loss are, and the gradient of the loss by them, one row a term."""
    node: Node | None = loss.grad_fn
    gradient = torch.ones_like(loss)
    while node is not None and node.name() in _FACTORS | _MEANS:
        results: Any = node(gradient)  # type: ignore[operator]  # torch's nodes can be called
        found = results if isinstance(results, tuple) else (results,)
        edges = [(place, edge) for place, edge in enumerate(node.next_functions) if edge[0] is not None]
        if len(edges) != 1 or found[edges[0][0]] is None:
            break
        (place, (following, output)) = edges[0]
        if node.name() in _MEANS and found[place].ndim:
            assert following is not None
            return GradientEdge(following, output), found[place]
        node, gradient = following, found[place]
    raise CannotMeasureError("the loss is no plain mean or sum of terms")


def _deviation(found: Sequence[Tensor | None], gradients: Sequence[Tensor | None], scale: Tensor) -> Tensor:
    """Return the largest relative difference of a parameter's gradient from the one that the optimizer gets."""
    differences = []
    for own, gradient in zip(found, gradients, strict=True):
        like = own if own is not None else gradient
        if like is None:
            continue
        total = torch.zeros_like(like) if own is None else own
        real = torch.zeros_like(like) if gradient is None else gradient * scale.to(gradient)
        differences.append(torch.stack((torch.linalg.vector_norm(total - real), torch.linalg.vector_norm(total))))
    difference, size = torch.stack(differences).unbind(1)
    return (difference / (size + 1e-3 * size.max()).clamp_min(torch.finfo(size.dtype).tiny)).max().to(scale.dtype)
