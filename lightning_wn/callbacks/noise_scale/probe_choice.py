"""Which probe reads a run, from its first look at the Trainer to the last change of the accumulation factor."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.probes.batch_pair import BatchPairProbe
from lightning_wn.probes.choice import PROBES, choose_probe
from lightning_wn.probes.mixers import known_mixer
from lightning_wn.probes.per_example import PerExampleProbe
from lightning_wn.probes.requirements import require_dense_gradients
from lightning_wn.trainer import first_accumulation


class ProbeChoice:
    """Gives a run's measurements the probe that fits it, and what depends on the probe.

    Args:
        wish: A probe's name or ``"auto"``.
        measurements: Get the probe, on every rank alike.
        half_life_steps: After so many optimizer steps a measurement counts half; None leaves the metrics their decay.
        examples_are_independent: Whether the examples of a batch share no data, as far as the user knows.
    """

    def __init__(
        self,
        wish: str,
        measurements: Measurements,
        *,
        half_life_steps: float | None = None,
        examples_are_independent: bool = True,
    ) -> None:
        self._wish = wish
        self._independent = examples_are_independent
        self._measurements = measurements
        self._half_life_steps = half_life_steps
        self._accumulation = 1
        # probe and cadence of a checkpoint, until its run goes on
        self._resumed: tuple[str, int] | None = None

    def choose(self, trainer: Trainer, model: LightningModule, *, wrapped: bool) -> None:
        """Choose by what is known before training, and anew once the model is wrapped and complete.

        Raises:
            ValueError: If nothing can read the run, or not the probe that was wished for; names the fix.
        """
        if not wrapped:
            self._accumulation = first_accumulation(trainer)
        require_dense_gradients(model)
        name = self._choose(trainer, model)
        self._measurements.probe = name
        for measurement in self._measurements:
            if name != measurement.probe.name:
                measurement.take_probe(PROBES[name]())
            if measurement.choice.preconditioned and not measurement.probe.can_precondition:
                raise ValueError(
                    f"`preconditioned=True` needs the whole denominator of the optimizer, and the probe {name!r} sees "
                    "one shard of it on each rank; use DDP, or `preconditioned=False`."
                )
            measurement.probe.require_readable(trainer, model, wrapped=wrapped)

    def _choose(self, trainer: Trainer, model: LightningModule) -> str:
        return choose_probe(self._wish, trainer, model, self._accumulation, independent=self._independent)

    def look_for_mixers(self, trainer: Trainer, model: LightningModule) -> None:
        """Leave ``per_example`` where a well-known transform lets the rows of a batch share data."""
        if self._measurements.probe == PerExampleProbe.name and (mixer := known_mixer(trainer, model)):
            self.leave_examples(f"{mixer} lets the rows of a batch share data")

    def leave_examples(self, why: str) -> None:
        """Go on without ``per_example``, whose samples are not independent in this run, and forget what it measured."""
        self._independent = False
        self._measurements.check.detach()
        for measurement in self._measurements:
            measurement.metric.reset()
        fix = "`examples_are_independent=False` says so from the start"
        cannot = "`GradientNoiseScaleCallback` cannot measure with the probe 'per_example'"
        if self._wish == "auto":
            rank_zero_warn(f"{cannot}, and 'batch_pair' takes over: {why}; {fix}.")
            self._take(BatchPairProbe.name)
            self._settle()
        else:
            rank_zero_warn(f"{cannot}, and measures nothing more: {why}; use `probe='batch_pair'`, or `probe='auto'`.")
            self._measurements.switch_off(f"{why}; use `probe='batch_pair'`, or `probe='auto'`")

    def resume_from(self, probe: str, every_n_steps: int) -> None:
        """Note how the run of a checkpoint was measured."""
        self._resumed = probe, every_n_steps

    def start(self) -> None:
        """Settle what depends on the probe, where no checkpoint's factor is still to come."""
        if self._resumed is None:
            self._settle()

    def start_batch(self, trainer: Trainer, model: LightningModule, batch_idx: int) -> None:
        """Follow the accumulation factor where a window starts, and where a resumed run goes on."""
        factor = trainer.accumulate_grad_batches
        changed = factor != self._accumulation
        if self._resumed is not None:
            # all callbacks have settled by now how it goes on
            (before, every_n_steps), self._resumed = self._resumed, None
            if changed:
                self._accumulation = factor
                self.choose(trainer, model, wrapped=True)
            if (self._wish, before, self._measurements.probe) == ("auto", BatchPairProbe.name, PerExampleProbe.name):
                # the run had found that its examples share data
                self._independent = False
                self._take(BatchPairProbe.name)
            self._keep_what_fits(before)
            # the number belongs to the probe that it was chosen for
            self._settle(every_n_steps if before == self._measurements.probe else None)
        elif changed and batch_idx % factor == 0:
            self._accumulation = factor
            before, now = self._measurements.probe, self._choose(trainer, model)
            if now != before:
                self._take(now)
                self._keep_what_fits(before)
                self._settle()

    def _take(self, name: str) -> None:
        """Go on with another probe in mid-run."""
        self._measurements.probe = name
        for measurement in self._measurements:
            probe = PROBES[name]()
            # training has gone on for a while: it must not stop for a measurement
            probe.strict = False
            measurement.take_probe(probe)

    def _keep_what_fits(self, before: str) -> None:
        """Forget what another probe measured if only one of the two is exact: one estimate is either exact or not."""
        if bool(PROBES[before].approximate) != bool(PROBES[self._measurements.probe].approximate):
            for measurement in self._measurements:
                measurement.metric.reset()

    def _settle(self, resumed_every_n_steps: int | None = None) -> None:
        """Set what depends on the probe, and say it where that is approximate."""
        for measurement in self._measurements:
            probe = measurement.probe
            given = self._measurements.every_n_steps
            measurement.every_n_steps = given or resumed_every_n_steps or probe.default_every_n_steps
            if self._half_life_steps is not None:
                measurement.metric.ema_decay = 0.5 ** (measurement.every_n_steps / self._half_life_steps)
            low_precision = any(p.dtype in (torch.float16, torch.bfloat16) for p in measurement.parameters)
            # 16-bit gradients are rounded while they accumulate: 8 bits of mantissa, a few additions
            rounded = low_precision or probe.reduces_in_low_precision
            measurement.metric.checksum_tolerance = 0.05 if rounded else 0.01
        probe = self._measurements[0].probe
        if probe.approximate:
            rank_zero_warn(
                f"`GradientNoiseScaleCallback` measures with the probe '{probe.name}', which is approximate: "
                f"{probe.approximate}."
            )
