"""Measurements on their way: into checkpoints and out of them, and home from worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_wn.callbacks.noise_scale.optimizer_measurement import OptimizerMeasurement, ParameterChoice
from lightning_wn.callbacks.worker_results import Mailbox
from lightning_wn.noise_scale.metric import GradientNoiseScale
from lightning_wn.probes.choice import PROBES

_MAX_OPTIMIZERS_BY_MAIL = 16


def metric_state(metric: GradientNoiseScale, names: Sequence[str]) -> dict[str, Any]:
    """Return what a metric has folded, as tensors, by the names of its columns."""
    moments = {name: row.clone() for name, row in zip(names, metric.moments, strict=True)}
    return {"moments": moments, "counts": metric.counts.clone()}


def restore_metric(metric: GradientNoiseScale, names: Sequence[str], state: dict[str, Any]) -> None:
    """Take over :func:`metric_state`; a column that it lacks starts afresh."""
    metric.reset()
    rows = [state["moments"].get(name, torch.zeros_like(metric.moments[0])) for name in names]
    metric.moments = torch.stack([row.cpu().to(torch.float64) for row in rows])
    metric.counts = state["counts"].clone().cpu()


def measurement_state(measurement: OptimizerMeasurement) -> dict[str, Any]:
    """Return one optimizer's measurements, as tensors and primitives."""
    choice = measurement.choice
    coverage = dict(zip(choice.covered, measurement.coverage, strict=True))
    state = metric_state(measurement.metric, ("total", *choice.names))
    return state | {"steps": measurement.steps, "coverage": coverage}


def restore_measurement(measurement: OptimizerMeasurement, state: dict[str, Any], *, with_coverage: bool) -> None:
    """Take over :func:`measurement_state`, with the coverage where no fit finds it out anew."""
    choice = measurement.choice
    restore_metric(measurement.metric, ("total", *choice.names), state)
    measurement.steps = state["steps"]
    if with_coverage:
        measurement.coverage = tuple(state["coverage"].get(name, 1.0) for name in choice.covered)


class Letter:
    """What a worker process has written: which probe measured, at which cadence, for how many optimizers, and what."""

    def __init__(self, numbers: Sequence[float]) -> None:
        count, every_n_steps, probe = map(int, numbers[:3])
        self.num_optimizers = count
        self.probe = list(PROBES)[probe]
        self._every_n_steps = every_n_steps
        self._numbers = numbers[3:]

    def fill(self, measurements: Sequence[OptimizerMeasurement], metrics: Iterable[GradientNoiseScale]) -> None:
        """Give fresh measurements the results; the metrics are theirs, and others that were posted with them."""
        numbers = iter(self._numbers)
        for metric in metrics:
            metric.reset()
            metric.moments = _filled(metric.moments, numbers)
            metric.counts = _filled(metric.counts, numbers)
        for measurement in measurements:
            measurement.every_n_steps = self._every_n_steps
            measurement.coverage = tuple(islice(numbers, len(measurement.choice.covered)))


class ResultsByMail:
    """Brings measurements home from processes that Lightning spawns or forks.

    Args:
        choice: What is measured of every optimizer, which says how much room a message needs.
    """

    def __init__(self, choice: ParameterChoice) -> None:
        empty = GradientNoiseScale(groups=choice.names)
        size = empty.moments.numel() + empty.counts.numel()
        # one more for the curvature
        room = (_MAX_OPTIMIZERS_BY_MAIL + 1) * size + _MAX_OPTIMIZERS_BY_MAIL * len(choice.covered)
        self._mailbox = Mailbox(3 + room)

    def post(self, measurements: Sequence[OptimizerMeasurement], metrics: Iterable[GradientNoiseScale]) -> None:
        """Leave the results for the parent process.

        Raises:
            ValueError: If there are too many optimizers.
        """
        if len(measurements) > _MAX_OPTIMIZERS_BY_MAIL:
            raise ValueError(
                f"`GradientNoiseScaleCallback` brings home the results of {_MAX_OPTIMIZERS_BY_MAIL} optimizers at most "
                f"from spawned processes, and there are {len(measurements)}; use `strategy='ddp'`."
            )
        first = measurements[0]
        message = [float(len(measurements)), first.every_n_steps, list(PROBES).index(first.probe.name)]
        for metric in metrics:
            message += [*metric.moments.flatten().tolist(), *metric.counts.tolist()]
        for measurement in measurements:
            message += measurement.coverage
        self._mailbox.post(message)

    def collect(self) -> Letter | None:
        """Return what another process left since the last look, if anything."""
        mail = self._mailbox.collect()
        return None if mail is None else Letter(mail)


def _filled(like: Tensor, numbers: Iterator[float]) -> Tensor:
    return torch.tensor(list(islice(numbers, like.numel())), dtype=torch.float64).reshape(like.shape)
