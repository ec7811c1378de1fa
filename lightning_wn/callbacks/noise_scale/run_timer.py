"""How long a run's micro-batches and optimizer steps take, on the host's clock and without asking the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

from lightning_wn.batch_size.run import RunTime

_FIRST_WINDOWS = 5
"""Left out: there memory is allocated, kernels are chosen and models are compiled."""
_ENOUGH_WINDOWS = 5
_LARGEST_MEMORY = 1000


class RunTimer:
    """Takes the times of micro-batches from the moments at which they begin.

    It never synchronises the device. Where the host works the device's kernels off itself (CPU), every interval is
    true, and medians keep rare events out: a checkpoint, a garbage collection. Where the host runs ahead of the
    device, single intervals say little and only their sum over many steps is true: then the mean is taken, and the
    optimizer's part is not told apart from the micro-batches'.

    Args:
        runs_ahead: Whether the host runs ahead of the device.
        clock: Seconds from any beginning.
    """

    def __init__(self, *, runs_ahead: bool = False, clock: Callable[[], float] = time.perf_counter) -> None:
        self.runs_ahead = runs_ahead
        self._clock = clock
        self._to_leave_out = _FIRST_WINDOWS
        # (seconds of one micro-batch, seconds of the step, micro-batches) of windows without and with a measurement
        self._windows: tuple[deque[tuple[float, float, int]], ...] = (
            deque(maxlen=_LARGEST_MEMORY),
            deque(maxlen=_LARGEST_MEMORY),
        )
        self._starts: list[float] = []
        self._before_step: float | None = None
        # (end, measured) of a window that waits for the next one's start
        self._ended: tuple[float, bool] | None = None

    def start_batch(self, *, first: bool) -> None:
        """Note the time at which a micro-batch begins, and whether it is the first of its window."""
        now = self._clock()
        if first:
            # the loading of the next data belongs to the window before
            self._close(now)
            self._starts = []
        self._starts.append(now)

    def before_step(self) -> None:
        """Note the time at which the gradients are complete."""
        if self._starts and self._before_step is None:
            self._before_step = self._clock()

    def end_window(self, *, full: bool, measured: bool) -> None:
        """Note the time after the optimizer's step; ``full`` is whether the window had all its micro-batches."""
        if full and self._starts:
            self._ended = self._clock(), measured
        else:
            self._forget()

    def interrupt(self) -> None:
        """Count nothing of what comes until the next batch begins: validation, the end of an epoch."""
        if self._ended is not None:
            self._close(self._ended[0])
        self._forget()

    def run_time(self) -> RunTime | None:
        """Return what the steps took so far; None while too few were seen."""
        for windows, includes_measuring in zip(self._windows, (False, True), strict=True):
            if len(windows) < _ENOUGH_WINDOWS:
                continue
            if self.runs_ahead:
                micro_batches = sum(count for *_, count in windows)
                total = sum(count * micro_batch + step for micro_batch, step, count in windows)
                micro_batch, step = total / micro_batches, 0.0
            else:
                micro_batch = median(micro_batch for micro_batch, *_ in windows)
                step = median(step for _, step, _ in windows)
                if step < 0:  # both cannot be told apart: keep the whole
                    micro_batch, step = median(m + s / count for m, s, count in windows), 0.0
            return RunTime(
                micro_batch_seconds=micro_batch,
                step_seconds=step,
                is_split=not self.runs_ahead,
                includes_measuring=includes_measuring,
                num_steps=len(windows),
            )
        return None

    def _close(self, now: float) -> None:
        """Keep the window that has ended, as it lasted until now."""
        if self._ended is not None:
            measured = self._ended[1]
            count, start = len(self._starts), self._starts[0]
            if self._to_leave_out:
                self._to_leave_out -= 1
            else:
                total = now - start
                if count > 1:
                    # the last one has the communication and the optimizer in it, the first one zeroes the gradients
                    among = self._starts[1:] if count > 2 else self._starts
                    micro_batch = (among[-1] - among[0]) / (len(among) - 1)
                else:
                    micro_batch = (self._before_step or now) - start
                self._windows[measured].append((micro_batch, total - count * micro_batch, count))
        self._forget()

    def _forget(self) -> None:
        self._ended = None
        self._before_step = None
        self._starts = []
