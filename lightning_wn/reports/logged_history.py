"""What the callback logged, kept for its own pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.reports.downsample import downsample

_LARGEST = 2000


class LoggedHistory:
    """The logged values of a run, a row a log step, thinned out when they get many."""

    def __init__(self) -> None:
        self.series: dict[str, list[float]] = {"step": []}

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add what was logged at a step."""
        length = len(self.series["step"])
        row = {"step": float(step), **values}
        for key in values:
            self.series.setdefault(key, [math.nan] * length)
        for key, column in self.series.items():
            column.append(float(row.get(key, math.nan)))
        if length >= max(_LARGEST, 8 * len(self.series)):
            self.series = downsample(self.series, length // 2)

    def of(self, prefix: str, estimate: NoiseScaleEstimate) -> dict[str, list[float]]:
        """Return ``"step"`` and the series of one optimizer; the estimate alone where nothing was logged."""
        found = {
            key: values for key, values in self.series.items() if key.rpartition("/")[0] == prefix or key == "step"
        }
        if len(found) > 1:
            return found
        return {"step": [0.0]} | {f"{prefix}/{key}": [value] for key, value in estimate.to_metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the series as tensors."""
        return {key: torch.tensor(values, dtype=torch.float64) for key, values in self.series.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`; an empty one leaves nothing."""
        self.series = {"step": []} | {key: values.tolist() for key, values in state.items()}
