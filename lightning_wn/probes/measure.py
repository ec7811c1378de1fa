"""The noise scale at fixed weights, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_wn.arguments import is_between, is_whole
from lightning_wn.noise_scale.batch_counting import BatchCount, BatchSizeFn, count_examples
from lightning_wn.noise_scale.curvature import curvature_samples, gradient_samples
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.metric import GradientNoiseScale
from lightning_wn.noise_scale.samples import GradientSamples
from lightning_wn.probes.per_example import PerExampleProbe
from lightning_wn.trainer import (
    Batches,
    copy_without_trainer,
    has_training_step,
    to_device,
    training_batches,
    training_step_output,
)

LossFn = Callable[[Any, Any], Tensor]
_Loss = Callable[[], Tensor]


def measure_noise_scale(
    model: nn.Module,
    data: Batches,
    loss_fn: LossFn | None = None,
    *,
    probe: Literal["micro_batch", "per_example"] = "micro_batch",
    batch_dims: Mapping[str, int | Literal["folded"]] | None = None,
    relative_error: float = 0.1,
    max_batches: int = 10_000,
    samples_per_measurement: int = 4,
    confidence: float = 0.95,
    batch_size_fn: BatchSizeFn | None = None,
    unit: str = "examples",
    curvature: bool = False,
) -> NoiseScaleEstimate:
    r"""Measure the gradient noise scale of a model as it is: fresh, or from a checkpoint.

    Each batch of ``data`` gives one gradient sample, and ``samples_per_measurement`` of them one measurement
    of |G|² and tr(Σ) (arXiv 1812.06162, appendix A.1). Measurements are averaged until the interval is
    narrow enough. A copy of the model does the work, in training mode: parameters, gradients, buffers,
    metrics and the global random state stay as they are. Takes the memory of the copy and two gradients.

    Args:
        model: A LightningModule, or any module with a ``loss_fn``.
        data: Batches, best shuffled and small (32 or so); begun anew when it ends, if it can be.
        loss_fn: From the model and a batch to the mean loss of the batch. By default
            ``model.training_step(batch, batch_idx)`` of a LightningModule.
        probe: What a gradient sample is: ``"micro_batch"`` a batch, which is right for any model; ``"per_example"`` an
            example, which tells tr(Σ) from fewer batches, of a model that does not mix examples.
        batch_dims: With ``per_example``, where modules have the batch in another dimension than the first, as in
            :class:`~lightning_wn.GradientNoiseScaleCallback`.
        relative_error: Stop when half the interval's width is this share of the noise scale or less.
        max_batches: Stop after so many batches at the latest.
        samples_per_measurement: Batches per measurement, 2 or more; fewer where a pass over the data ends.
        confidence: Level of the interval, in (0, 1).
        batch_size_fn: From a batch to the number of examples that its loss is a mean over.
        unit: The name of what is counted; of any but ``"examples"``, as tokens, only different batches are taken to be
            independent, and ``noise_scale`` is of steps with ``samples_per_measurement`` equally weighted batches.
        curvature: Measure the curvature-weighted noise scale B_noise = tr(HΣ)/(GᵀHG) of section 2.2 of the paper
            in the place of tr(Σ)/\|G\|²: closer to the critical batch size where directions differ in curvature, and
            noisier. Each measurement takes one batch more, whose Hessian H is multiplied with the gradients.

    Returns:
        The estimate; ``batch_size`` is that of a batch of ``data``. The interval says whether
        ``relative_error`` was reached. With ``curvature``, ``grad_sq_norm`` holds GᵀHG and ``cov_trace`` tr(HΣ).

    Raises:
        ValueError: For arguments out of range, a model that ``per_example`` cannot measure or one without loss, no
            trainable parameters, data that gives fewer batches than one measurement takes, or a batch whose size
            cannot be inferred or is zero.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> data = DataLoader(TensorDataset(torch.randn(512, 4), torch.randn(512, 1)), 16, shuffle=True)
        >>> estimate = measure_noise_scale(
        ...     nn.Linear(4, 1), data, lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
        ... )
        >>> estimate.lower < estimate.noise_scale < estimate.upper
        True
    """
    if not is_between(relative_error, 0.0):
        raise ValueError(f"`relative_error` must be a positive number, got {relative_error!r}; 0.1 is ten percent.")
    if not is_whole(samples_per_measurement, 2):
        raise ValueError(
            f"`samples_per_measurement` must be 2 or more, got {samples_per_measurement!r}: one gradient alone does "
            "not tell the mean from the noise."
        )
    if loss_fn is None and not has_training_step(model):
        raise ValueError(
            f"`loss_fn` is needed for a {type(model).__name__}, which is no LightningModule; pass a function from the "
            "model and a batch to the mean loss."
        )
    _check_way(probe, curvature=curvature, batch_dims=batch_dims)
    metric = GradientNoiseScale(ema_decay=1.0, confidence=confidence, unit=unit)
    copied = copy_without_trainer(model).train()
    parameters = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("`model` has no parameter with `requires_grad=True`; unfreeze what is to be measured.")

    device = parameters[0].device
    take: Callable[[list[_Loss], list[BatchCount]], GradientSamples | None]
    if probe == "per_example":
        take = _Examples(copied, parameters, batch_dims or {})
    else:
        take = partial(_take_curvature if curvature else _take_batches, parameters)
    count = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        for window in _windows(data, samples_per_measurement + curvature, max_batches):
            counts = [_count(batch, batch_size_fn) for batch in window]
            losses: list[_Loss] = [
                partial(_loss, copied, batch, count + i, loss_fn, device) for i, batch in enumerate(window)
            ]
            count += len(window)
            if (samples := take(losses, counts)) is None:  # what a pass over the data leaves
                continue
            metric.add_samples(samples)
            metric.synchronize(across_ranks=False)
            estimate = metric.estimate()
            if (estimate.upper - estimate.lower) / 2 <= relative_error * estimate.noise_scale < math.inf:
                break
    estimate = metric.estimate(probe="curvature" if curvature else probe)
    if not estimate.num_measurements:
        raise ValueError(
            f"`data` gave {count} batches, none of two or more with finite gradients; pass more or smaller batches, "
            "and a loss that is finite."
        )
    return estimate


def _count(batch: Any, batch_size_fn: BatchSizeFn | None) -> BatchCount:
    count = count_examples(batch, batch_size_fn)
    if not isinstance(count.total, Tensor) and not count.total:
        raise ValueError(
            "`data` gave a batch that counts no example; leave it out, or let `batch_size_fn` return what the loss is "
            "a mean over."
        )
    return count


def _check_way(probe: str, *, curvature: bool, batch_dims: object) -> None:
    if probe not in ("micro_batch", "per_example"):
        raise ValueError(
            f"`probe` must be 'micro_batch' or 'per_example', got {probe!r}; the first is right for any model."
        )
    if curvature and probe == "per_example":
        raise ValueError("`curvature=True` multiplies gradients of whole batches; leave `probe` 'micro_batch'.")
    if batch_dims and probe != "per_example":
        raise ValueError("`batch_dims` says where examples lie in a batch; set `probe='per_example'`, or leave it out.")


class _Examples:
    """Takes the gradient of every example out of the backward passes of a few batches."""

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], batch_dims: Mapping[str, int | Literal["folded"]]
    ) -> None:
        self._model = model
        self._measured = MeasuredParameters(parameters)
        self._probe = PerExampleProbe()
        self._probe.batch_dims = batch_dims

    def __call__(self, losses: list[_Loss], counts: list[BatchCount]) -> GradientSamples | None:
        self._probe.begin(0, 1, self._model, self._measured)
        weight = 1.0 / len(losses)
        for loss, count in zip(losses, counts, strict=True):
            self._probe.before_forward(count)
            value = loss() * weight
            self._probe.before_backward(value)
            value.backward()  # type: ignore[no-untyped-call]  # torch's
            self._probe.after_backward(count.total, weight, None)
        samples = self._probe.finish(None, full=True)
        for parameter in self._measured.parameters:
            parameter.grad = None
        # the batch size in use is that of one batch of the data
        return None if samples is None else replace(samples, examples=counts[0].total, micro_batches=1)


def _take_batches(
    parameters: Sequence[nn.Parameter], losses: list[_Loss], counts: list[BatchCount]
) -> GradientSamples | None:
    return gradient_samples(parameters, [(loss, n.total) for loss, n in zip(losses, counts, strict=True)])


def _take_curvature(
    parameters: Sequence[nn.Parameter], losses: list[_Loss], counts: list[BatchCount]
) -> GradientSamples | None:
    if len(losses) <= 2:
        return None
    others = [(loss, n.total) for loss, n in zip(losses[1:], counts[1:], strict=True)]
    return curvature_samples(parameters, losses[0], others)


def _loss(model: nn.Module, batch: Any, index: int, loss_fn: LossFn | None, device: torch.device) -> Tensor:
    batch = to_device(batch, device)
    output: Any = training_step_output(model, batch, index) if loss_fn is None else loss_fn(model, batch)
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"The loss of a batch must be one number, got {type(loss).__name__} from "
            f"{'`training_step`' if loss_fn is None else '`loss_fn`'}; return the mean over the batch."
        )
    return loss


def _windows(data: Batches, length: int, limit: int) -> Iterator[list[Any]]:
    """Yield lists of ``length`` batches, shorter ones where a pass over the data or the limit ends."""
    loader = training_batches(data)
    left = limit
    while left > 0:
        before = left
        batches = islice(loader, left)
        # two batches of different passes may share examples, and two of one pass do not: never mix them
        while window := list(islice(batches, length)):
            left -= len(window)
            yield window
        if left == before:  # a generator ends once
            return
