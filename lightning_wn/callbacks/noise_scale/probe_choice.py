"""Which probe reads a run, from its first look at the Trainer to the last change of the accumulation factor."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.noise_scale.batch_counting import BatchCount, BatchSizeFn, count_examples
from lightning_wn.probes.batch_pair import BatchPairProbe
from lightning_wn.probes.checks.mixers import known_mixer
from lightning_wn.probes.choice import PROBES, choose_probe
from lightning_wn.probes.per_example import PerExampleProbe
from lightning_wn.probes.requirements import require_dense_gradients
from lightning_wn.text import some
from lightning_wn.trainer import first_accumulation


class ProbeChoice:
    """Gives a run's measurements the probe that fits it, and what depends on the probe.

    Args:
        wish: A probe's name or ``"auto"``.
        measurements: Get the probe, on every rank alike.
        half_life_steps: After so many optimizer steps a measurement counts half; None leaves the metrics their decay.
        batch_dims: What the probe is told of where the batch lies.
        examples_are_independent: Whether the examples of a batch share no data, as far as the user knows.
    """

    def __init__(
        self,
        wish: str,
        measurements: Measurements,
        *,
        half_life_steps: float | None = None,
        batch_dims: Mapping[str, int | Literal["folded"]] | None = None,
        examples_are_independent: bool = True,
    ) -> None:
        self._wish = wish
        self._independent = examples_are_independent
        self._measurements = measurements
        self._half_life_steps = half_life_steps
        self._batch_dims = batch_dims or {}
        self._accumulation = 1
        # probes that could not read this run, with the cause
        self._unfit: dict[str, str] = {}
        self._said: set[str] = set()
        # probe and cadence of a checkpoint, until its run goes on
        self._resumed: tuple[str, int] | None = None

    def choose(self, trainer: Trainer, model: LightningModule, *, wrapped: bool) -> None:
        """Choose by what is known before training, and anew once the model is wrapped and complete.

        ``"auto"`` passes over what cannot read the run; where nothing can, it says why, and measures nothing.

        Raises:
            ValueError: If the probe that was named cannot read the run, or ``batch_dims`` names no module; names the
                fix.
        """
        if not wrapped:
            self._accumulation = first_accumulation(trainer)
        else:
            self._require_modules(model)
        while not self._measurements.why_off:
            try:
                require_dense_gradients(model)
                name = self._choose(trainer, model)
            except ValueError as error:
                self.give_up(error)
                return
            if name is None:
                self.give_up(ValueError(list(self._unfit.values())[-1]))
                return
            self._take(name, strict=not self._is_free)
            try:
                for measurement in self._measurements:
                    measurement.probe.require_readable(trainer, model, wrapped=wrapped)
                    if measurement.probe.refusal:
                        raise ValueError(measurement.probe.refusal)
            except ValueError as error:
                if not self._is_free:
                    raise
                self._pass_over(name, str(error))
                continue
            return

    def give_up(self, error: ValueError) -> None:
        """Measure nothing from here on and say why, where the user named no probe.

        Raises:
            ValueError: The error itself where a probe was named.
        """
        if not self._is_free:
            raise error
        rank_zero_warn(f"`GradientNoiseScaleCallback` measures nothing in this run, which goes on without it: {error}")
        self._measurements.switch_off(str(error))

    def count(self, trainer: Trainer, batch: Any, batch_size_fn: BatchSizeFn | None) -> BatchCount:
        """Count a batch; by default training goes on without the step, or any, where that cannot be done.

        Raises:
            ValueError: If it cannot be done where a probe or ``batch_size_fn`` was given.
        """
        try:
            return count_examples(batch, batch_size_fn)
        except ValueError as error:
            if batch_size_fn is not None:
                raise
            if trainer.world_size == 1 or not self._is_free:
                self.give_up(error)
            else:
                # other ranks may have counted theirs: all of them have to hear of it
                for measurement in self._measurements:
                    measurement.leave_out()
                self._say_once(f"leaves out steps, and says so once: {error}")
            return BatchCount(1.0)

    def look_for_mixers(self, trainer: Trainer, model: LightningModule) -> None:
        """Leave ``per_example`` where a well-known transform lets the rows of a batch share data."""
        if self._measurements.probe == PerExampleProbe.name and (mixer := known_mixer(trainer, model)):
            self.leave_examples(f"{mixer} lets the rows of a batch share data")

    def leave_examples(self, why: str) -> None:
        """Go on without ``per_example``, whose samples are not independent in this run, and forget what it measured."""
        self._independent = False
        self._measurements.check.detach()
        if self._is_free:
            said = f"{why}; `examples_are_independent=False` says so from the start"
            self._pass_over(PerExampleProbe.name, said, BatchPairProbe.name)
            self._take(BatchPairProbe.name, strict=False)
            self._settle()
            return
        for measurement in self._measurements:
            measurement.metric.reset()
        fix = "use `probe='batch_pair'`, or `probe='auto'`"
        rank_zero_warn(
            "`GradientNoiseScaleCallback` cannot measure with the probe 'per_example', and measures nothing more: "
            f"{why}; {fix}."
        )
        self._measurements.switch_off(f"{why}; {fix}")

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
                self._take(BatchPairProbe.name, strict=False)
            self._keep_what_fits(before)
            # the number belongs to the probe that it was chosen for
            self._settle(every_n_steps if before == self._measurements.probe else None)
        elif batch_idx % factor == 0:
            self._accumulation = factor
            self._follow(trainer, model, changed=changed)

    @property
    def _is_free(self) -> bool:
        return self._wish == "auto"

    def _follow(self, trainer: Trainer, model: LightningModule, *, changed: bool) -> None:
        """Go over to another probe where the factor has changed, or where the present one cannot go on."""
        before = self._measurements.probe
        refusal = next((m.probe.refusal for m in self._measurements if m.probe.refusal), "")
        # ranks must agree; there a step that cannot be read is left out
        moves_on = bool(refusal) and self._is_free and trainer.world_size == 1
        if moves_on:
            self._unfit[before] = refusal
        elif refusal:
            fix = "" if self._is_free else "; `probe='auto'` goes over to another probe by itself"
            self._say_once(f"leaves out steps, and says so once: {refusal}{fix}.")
        if not (changed or moves_on):
            return
        now = self._choose(trainer, model)
        if now is None:
            self.give_up(ValueError(refusal or list(self._unfit.values())[-1]))
        elif now != before:
            if moves_on:
                self._pass_over(before, refusal, now)
            self._take(now, strict=False)  # training has gone on for a while: it must not stop for a measurement
            self._keep_what_fits(before)
            self._settle()

    def _choose(self, trainer: Trainer, model: LightningModule) -> str | None:
        return choose_probe(
            self._wish, trainer, model, self._accumulation, independent=self._independent, unfit=self._unfit
        )

    def _require_modules(self, model: LightningModule) -> None:
        names = [name for name, _ in model.named_modules()]
        for pattern in self._batch_dims:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"`batch_dims` names {pattern!r}, which matches no module of {type(model).__name__}: its modules "
                    f"are {some(names[1:])}; name one of them, or a glob such as 'encoder.*'."
                )

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            rank_zero_warn(f"`GradientNoiseScaleCallback` {sentence}")

    def _pass_over(self, name: str, reason: str, now: str = "") -> None:
        """Note that a probe cannot read the run, and say it; what it measured may not be right either."""
        self._unfit[name] = reason
        taken = f", and {now!r} takes over" if now else ""
        rank_zero_warn(f"`GradientNoiseScaleCallback` cannot measure with the probe {name!r}{taken}: {reason}.")
        for measurement in self._measurements:
            measurement.metric.reset()

    def _take(self, name: str, *, strict: bool) -> None:
        """Give all measurements the probe of this name, unless it is theirs."""
        self._measurements.probe = name
        for measurement in self._measurements:
            if name != measurement.probe.name:
                measurement.take_probe(PROBES[name]())
            measurement.probe.strict &= strict
            measurement.probe.batch_dims = self._batch_dims
            if measurement.choice.preconditioned and not measurement.probe.can_precondition:
                raise ValueError(
                    f"`preconditioned=True` needs the whole denominator of the optimizer, and the probe {name!r} sees "
                    "one shard of it on each rank; use DDP, or `preconditioned=False`."
                )

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
