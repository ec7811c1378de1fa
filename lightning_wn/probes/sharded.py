"""Probe: one gradient sample is what one rank hands to one reduce-scatter of FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.norms import foreach_norms
from lightning_wn.noise_scale.samples import NUM_CHECKSUMS, GradientSamples
from lightning_wn.probes.base import Probe, mean_scale, sample_sizes
from lightning_wn.probes.checks.checksums import FlatProjection, choose_flat_projections
from lightning_wn.probes.fsdp2.groups import (
    ShardedGroup,
    read_sharded_groups,
    reduces_in_low_precision,
    require_shardable,
    require_sharded,
    require_torchs_reduce_scatter,
    sharded_data_parallel_size,
)
from lightning_wn.probes.fsdp2.reduce_scatter import TappedReduceScatter
from lightning_wn.probes.requirements import require_independent_ranks

_DTYPE = torch.float64


class ShardedProbe(Probe):
    """Sees each rank's local gradient just before FSDP2 averages it and keeps one shard of the mean.

    The input of a parameter group's reduce-scatter is the flat gradient of this rank's own examples (also
    under hybrid sharding, where replicas are averaged afterwards). Its norm is taken on the stream of the
    reduce-scatter, and nothing is kept or changed. The norm of the mean comes from the sharded gradients of
    the optimizer: the squared norms of the shards add up over ranks, with the sums that travel anyway.

    Where every micro-batch is reduced, as Lightning's ModelParallelStrategy does, each is a sample. Where
    ``set_requires_gradient_sync(False)`` lets gradients accumulate first, a sample is what they add up to.
    """

    name = "sharded"
    can_precondition = False

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._measured = MeasuredParameters(())
        self._pieces: list[list[_Piece]] | None = None
        self._groups: list[ShardedGroup] = []
        self._taps: list[TappedReduceScatter] = []
        self._projections: dict[int, FlatProjection] = {}
        self._step = _Step()
        self._backward: _Backward | None = None

    def require_readable(self, trainer: Trainer, pl_module: LightningModule, *, wrapped: bool) -> None:
        """Raise ValueError unless this is FSDP2 over two or more data-parallel ranks, and readable."""
        sharded_data_parallel_size(trainer.strategy)
        require_independent_ranks(trainer, pl_module, may_convert=False)
        if wrapped:
            self.reduces_in_low_precision = reduces_in_low_precision(require_shardable(trainer, pl_module))

    def begin(self, step: int, every_n_steps: int, model: nn.Module, measured: MeasuredParameters) -> None:
        """Start a step; the reduce-scatters are replaced anew only where the parameters changed.

        Raises:
            ValueError: For a model or optimizer that cannot be read, with a sentence that says what to change.
        """
        if not self._taps or measured is not self._measured:
            self.detach()
            groups = read_sharded_groups(model)
            require_sharded(model, groups, measured.parameters)
            require_torchs_reduce_scatter(groups)
            self._measured, self._groups = measured, groups
            self._pieces = _pieces_of(groups, measured)
            self._projections = choose_flat_projections(groups, {id(p) for p in measured.parameters})
            for index, group in enumerate(groups):
                tap = TappedReduceScatter(group.reduce_scatter, index, self._see_gradient)
                self._taps.append(tap)
                group.set_reduce_scatter(tap)
        self._step = _Step()
        self._backward = None

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Record what the reduce-scatters see from here on."""
        device = self._groups[0].device
        # filled on the stream of the reduce-scatter, which waits for this one before it starts
        count = len(self._groups) if self._pieces is None else len(self._measured.parameters)
        norms = {dtype: torch.zeros(count, device=device, dtype=dtype) for dtype in (torch.float32, _DTYPE)}
        self._backward = _Backward(norms, torch.zeros(NUM_CHECKSUMS, 2, device=device, dtype=_DTYPE))

    def after_backward(self, size: float | Tensor, weight: float, loss_scale: Tensor | None) -> None:
        """Close one sample, or let the micro-batch wait for the backward pass that reduces its gradient too."""
        step, backward = self._step, self._backward
        self._backward = None
        step.waiting.append((size, weight))
        step.examples = step.examples + size
        step.micro_batches += 1
        if backward is None or not backward.fired:
            return
        fired = frozenset(backward.fired)
        step.fired_first = step.fired_first or fired
        # the parts of a gradient that is reduced twice in one pass cannot be told from two samples; neither can
        # gradients that accumulate in one group be told from those that another has reduced already
        step.irregular |= len(fired) < len(backward.fired) or fired != step.fired_first
        for event in backward.events.values():
            torch.get_device_module(backward.checks.device).current_stream().wait_event(event)
        total = sum(weight for _, weight in step.waiting)
        factor = 1.0 / total if loss_scale is None else 1.0 / (total * loss_scale.to(_DTYPE))
        norms = torch.stack([norm.to(_DTYPE) for norm in backward.norms.values()])
        squares = (norms * factor).square().sum(0)
        step.sq_norms.append(self._measured.add_up(range(len(squares)), squares))
        step.checksums.append(backward.checks * factor)
        step.sizes.append(_effective_size(step.waiting))
        step.weights.append(total)
        step.waiting = []

    def finish(self, grad_scale: Tensor | None, *, full: bool) -> GradientSamples | None:
        """Take this rank's part of the squared norm of the optimizer's gradient.

        A row's |ḡ|² is a mean over ranks, and the R ranks hold R / S copies of the S shards: each contributes
        S times its shard's squared norm.
        """
        step = self._step
        if not step.weights and not step.waiting:
            return None
        self._step = _Step()
        device = self._groups[0].device
        # a gradient that still waits will leak into the next step
        irregular = step.irregular or bool(step.waiting)
        if not step.weights:  # every rank must add a row, to keep in step with the others
            columns = () if self._measured.single_column else (1 + len(self._measured.groups),)
            step.sq_norms, step.sizes, step.weights = [torch.zeros(columns, device=device, dtype=_DTYPE)], [1.0], [1.0]
            step.layout_known = False
        scale = mean_scale(sum(step.weights), grad_scale, _DTYPE)
        with torch.no_grad():
            mean_sq_norm = self._mean_sq_norm(device)
            grad_checks = self._grad_checks(device) * scale
        checks = torch.stack(step.checksums) if step.layout_known else None
        return GradientSamples(
            sq_norms=torch.stack(step.sq_norms),
            sizes=sample_sizes(step.sizes, device, _DTYPE),
            weights=step.weights,
            grad_sq_norm=mean_sq_norm * scale**2,
            checksums=None if checks is None else checks[..., 0],
            checksum_sizes=None if checks is None else checks[..., 1],
            grad_checksums=None if checks is None else grad_checks,
            grad_in_shards=True,
            examples=step.examples,
            micro_batches=step.micro_batches,
            full=full,
            irregular=irregular,
        )

    def detach(self) -> None:
        """Put the reduce-scatters back and forget the step."""
        for group, tap in zip(self._groups, self._taps, strict=False):
            tap.closed = True
            # whoever replaced ours in the meantime keeps theirs
            if group.reduce_scatter is tap:
                group.set_reduce_scatter(tap.open_inner)
        self._forget()

    def _see_gradient(self, index: int, flat_grad: Tensor, op: Any) -> None:
        """Take the norm of one group's flat local gradient, on the stream of its reduce-scatter."""
        backward = self._backward
        if backward is None:
            return
        backward.fired.append(index)
        divided_by = self._groups[index].pre_division(flat_grad, op)
        norms = backward.norms[_DTYPE if flat_grad.dtype == _DTYPE else torch.float32]
        with torch.no_grad():
            if self._pieces is None:
                torch.linalg.vector_norm(flat_grad, dtype=norms.dtype, out=norms[index])
                norms[index].mul_(divided_by)
            elif flat_grad.numel() == self._groups[index].flat_length:
                rows = flat_grad.view(self._groups[index].shard_size, -1)
                for piece in self._pieces[index]:
                    columns = rows[:, piece.start : piece.end]
                    torch.linalg.vector_norm(columns, dtype=norms.dtype, out=norms[piece.place])
                    norms[piece.place].mul_(divided_by)
            else:  # which parameters are left out cannot be told
                self._step.irregular = True
            if (projection := self._projections.get(index)) is not None:
                if projection.fits(flat_grad):
                    backward.checks[projection.slot] = projection.of_flat(flat_grad) * divided_by
                else:  # parameters without a gradient are left out of the flat one
                    self._step.layout_known = False
        if flat_grad.device.type != "cpu":
            stream = torch.get_device_module(flat_grad.device).current_stream()
            backward.events[stream] = stream.record_event()

    def _mean_sq_norm(self, device: torch.device) -> Tensor:
        """This rank's part of |ḡ|², by the columns of what is measured."""
        group_of = {id(parameter): group for group in self._groups for parameter in group.parameters}
        places, shards, factors = [], [], []
        for place, parameter in enumerate(self._measured.parameters):
            shard = _local_grad(parameter)
            if shard is not None:
                group = group_of[id(parameter)]
                places.append(place)
                shards.append(shard)
                factors.append(group.shard_size * group.mean_factor**2)
        if not shards:
            norms = torch.zeros(0, device=device, dtype=_DTYPE)
        else:
            norms = torch.stack([norm.to(device, _DTYPE) for norm in foreach_norms(shards)])
        return self._measured.add_up(places, norms.square() * torch.tensor(factors, dtype=_DTYPE).to(device))

    def _grad_checks(self, device: torch.device) -> Tensor:
        """Project the optimizer's gradient, shape (NUM_CHECKSUMS,): this rank's part, as of |ḡ|²."""
        checks = [torch.zeros((), device=device, dtype=_DTYPE)] * NUM_CHECKSUMS
        for index, projection in self._projections.items():
            grad, group = _local_grad(projection.parameter), self._groups[index]
            if grad is not None:
                factor = group.shard_size * group.mean_factor
                checks[projection.slot] = projection.of_shard(grad)[0].to(device, _DTYPE) * factor
        return torch.stack(checks)


@dataclass
class _Backward:
    """What the reduce-scatters of one backward pass showed."""

    norms: dict[torch.dtype, Tensor]
    """Norm of each group's flat gradient, or of each parameter's, in the type that it was taken in; zero elsewhere."""
    checks: Tensor
    """Projections and the sizes of their terms, shape (NUM_CHECKSUMS, 2)."""
    fired: list[int] = field(default_factory=list)
    """Groups in the order in which they were reduced."""
    events: dict[Any, Any] = field(default_factory=dict)
    """The last event on each stream that a norm was taken on."""


@dataclass
class _Step:
    """What was collected since ``begin``."""

    irregular: bool = False
    examples: float | Tensor = 0.0
    micro_batches: int = 0
    layout_known: bool = True
    fired_first: frozenset[int] = frozenset()
    """Groups that the first reducing backward pass reduced."""
    waiting: list[tuple[float | Tensor, float]] = field(default_factory=list)
    """Size and weight of the micro-batches whose gradients accumulate unreduced."""
    sq_norms: list[Tensor] = field(default_factory=list)
    checksums: list[Tensor] = field(default_factory=list)
    sizes: list[float | Tensor] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class _Piece(NamedTuple):
    """Where a measured parameter's gradient lies in each row of its group's flat gradient."""

    place: int
    """Position among the measured parameters."""
    start: int
    end: int


def _pieces_of(groups: Sequence[ShardedGroup], measured: MeasuredParameters) -> list[list[_Piece]] | None:
    """Return the pieces of each group, or None where whole flat gradients are what is measured."""
    places = {id(parameter): place for place, parameter in enumerate(measured.parameters)}
    sharded = {id(parameter) for group in groups for parameter in group.parameters}
    if measured.single_column and sharded == set(places):
        return None
    pieces = []
    for group in groups:
        ends = list(accumulate(group.padded_shard_lengths, initial=0))
        spans = zip(map(id, group.parameters), ends, ends[1:], strict=False)
        pieces.append([_Piece(places[key], start, end) for key, start, end in spans if key in places])
    return pieces


def _local_grad(parameter: nn.Parameter) -> Tensor | None:
    """Return this rank's shard of the gradient, or None where there is none or the shard is empty."""
    if parameter.grad is None:
        return None
    local: Tensor = parameter.grad.to_local()  # type: ignore[attr-defined]  # a DTensor
    return local if local.numel() else None


def _effective_size(parts: Sequence[tuple[float | Tensor, float]]) -> float | Tensor:
    """Return the n with E|g|² = |G|² + tr(Σ)/n for g = Σ w_j g_j / Σ w_j over micro-batches of n_j examples."""
    if len(parts) == 1:
        return parts[0][0]
    total = sum(weight for _, weight in parts)
    inverse = sum(weight**2 / size for size, weight in parts)
    return total**2 / inverse
