"""The training loss of a branch over its optimizer steps, and how many steps it takes to a loss."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

SMOOTHING = 0.2
"""Losses are smoothed over steps from s/(1 + 0.2) to s·(1 + 0.2): the same share of training at every batch size."""
_MOST_POINTS = 4096
_JUST_ABOVE_ONE = 1.0 + 1e-12
"""A point at the very edge is within it, whatever way the logarithms are rounded."""


@dataclass(frozen=True)
class LossCurve:
    """Losses over a branch; a point stands for one optimizer step, or for several in a row.

    Attributes:
        steps: Optimizer steps of the branch up to and with each point.
        examples: Examples up to and with each point, over all ranks.
        losses: Mean loss over the point's steps, each taken before its update; or the monitored value.
    """

    steps: tuple[int, ...] = ()
    examples: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()

    def steps_to(self, target: float, smoothing: float = SMOOTHING) -> float:
        """Return the optimizer steps until the smoothed loss is at the target; infinite where it never is.

        Between points it is interpolated in log(steps). The last part, which smoothing needs to look ahead, does not
        count as reached.
        """
        smoother = Smoother(self, smoothing)
        before: tuple[float, float] | None = None
        for place in smoother.places:
            step = math.exp(place)
            if step * (1.0 + smoothing) > self.steps[-1] * _JUST_ABOVE_ONE:
                break
            loss = smoother(step)
            if loss <= target:
                if before is None:
                    return step
                share = (before[1] - target) / (before[1] - loss)
                return math.exp(before[0] + share * (place - before[0]))
            before = place, loss
        return math.inf

    def means(self, edges: Sequence[float]) -> list[float]:
        """Return the mean loss between each two neighbours of ``edges``, which count examples.

        Where a point reaches over an edge, its loss counts on both sides by its share.
        """
        totals, weights = [0.0] * (len(edges) - 1), [0.0] * (len(edges) - 1)
        begin = 0.0
        for end, loss in zip(self.examples, self.losses, strict=True):
            for index in range(len(edges) - 1):
                shared = min(end, edges[index + 1]) - max(begin, edges[index])
                if shared > 0:
                    totals[index] += shared * loss
                    weights[index] += shared
            begin = end
        return [total / weight if weight else math.nan for total, weight in zip(totals, weights, strict=True)]


class Smoother:
    """The loss after any number of steps, by a straight line in log(steps) through the points around.

    It takes running sums, and so linear time for a whole curve.

    Args:
        curve: The losses.
        smoothing: Points from ``step / (1 + smoothing)`` to ``step * (1 + smoothing)`` count. 0 joins the points.
    """

    def __init__(self, curve: LossCurve, smoothing: float = SMOOTHING) -> None:
        widths = [after - before for before, after in pairwise((0, *curve.steps))]
        # the losses of a step were taken before its update; a monitored value after it
        ends = zip(curve.steps, widths, strict=True)
        self.places = [math.log(step - width / 2 if smoothing else step) for step, width in ends]
        self._losses = curve.losses
        self._reach = math.log1p(smoothing) * _JUST_ABOVE_ONE
        points = list(zip(self.places, curve.losses, widths, strict=True))
        self._sums = [
            list(accumulate((term(*point) for point in points), initial=0.0))
            for term in (
                lambda x, y, w: float(w),
                lambda x, y, w: w * x,
                lambda x, y, w: w * y,
                lambda x, y, w: w * x * x,
                lambda x, y, w: w * x * y,
            )
        ]

    def __call__(self, step: float) -> float:
        """Return the loss after so many optimizer steps from the branch's beginning, a positive number."""
        place = math.log(step)
        first = bisect_left(self.places, place - self._reach)
        last = bisect_right(self.places, place + self._reach)
        if last - first < 2:  # the points beside
            first = max(min(bisect_left(self.places, place), len(self.places) - 1) - 1, 0)
            last = min(first + 2, len(self.places))
        if last - first == 1:
            return self._losses[first]
        w, x, y, xx, xy = (sums[last] - sums[first] for sums in self._sums)
        slope = (xy - x * y / w) / (xx - x * x / w)
        return y / w + slope * (place - x / w)


class CurveRecorder:
    """Collects a :class:`LossCurve`; where it gets long, neighbours are joined, so that memory stays small."""

    def __init__(self, most_points: int = _MOST_POINTS) -> None:
        self.most_points = most_points
        self._stride = 1
        # [optimizer steps, examples, sum of losses]
        self._points: list[list[float]] = []

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return int(sum(point[0] for point in self._points)) if self._points else 0

    def add(self, *, examples: float, loss: float) -> None:
        """Add an optimizer step."""
        if self._points and self._points[-1][0] < self._stride:
            last = self._points[-1]
            self._points[-1] = [last[0] + 1, last[1] + examples, last[2] + loss]
            return
        if len(self._points) == self.most_points:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [[x + y for x, y in zip(first, second, strict=True)] for first, second in pairs]
            self._stride *= 2
        self._points.append([1.0, examples, loss])

    def curve(self) -> LossCurve:
        """Return what was collected so far."""
        steps, examples, at_step, at_example = [], [], 0.0, 0.0
        for count, size, _ in self._points:
            at_step += count
            at_example += size
            steps.append(int(at_step))
            examples.append(at_example)
        losses = [total / count for count, _, total in self._points]
        return LossCurve(tuple(steps), tuple(examples), tuple(losses))
