"""What users ask of a callback about the noise scale that it has measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightning_wn.batch_size.advice import BatchSizeAdvice
from lightning_wn.callbacks.noise_scale.log import NoiseScaleLog
from lightning_wn.callbacks.noise_scale.measurements import Measurements
from lightning_wn.callbacks.noise_scale.run_watch import RunWatch
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NoiseScaleResults:
    """Estimates, advice and a picture, of what a subclass measures and watches."""

    _measurements: Measurements
    _watch: RunWatch
    _log: NoiseScaleLog

    def estimate(self, optimizer: int | None = None, group: str | None = None) -> NoiseScaleEstimate:
        """Return an estimate as of the last synchronisation (log step, checkpoint, end of training).

        The same on every rank. Never communicates, so it may be called on one rank alone.

        Args:
            optimizer: Position among the LightningModule's optimizers; None is the only one.
            group: A name in ``groups``, ``"preconditioned"`` or ``"curvature"`` where they are measured; None is
                the simple noise scale of all measured parameters.

        Raises:
            ValueError: If there is no such optimizer or group, or several optimizers and none is named.
        """
        return self._measurements.estimate(optimizer, group)

    def estimates(self) -> dict[str, NoiseScaleEstimate]:
        """Return all estimates, by what stands between ``prefix`` and the last part of their logged keys.

        ``"total"`` is that of all measured parameters. With several optimizers each name starts with
        ``"optimizer_0/"`` and so on.
        """
        return self._measurements.estimates()

    def advise(
        self, optimizer: int | None = None, *, target: float = 1.0, price_per_device_hour: float | None = None
    ) -> BatchSizeAdvice:
        """Return a batch size to try, with what it would change; as of the last synchronisation.

        The numbers are the same on every rank, except for the times, which are each rank's own.

        Args:
            optimizer: Position among the LightningModule's optimizers; None is the only one.
            target: The wished batch size over the noise scale: 1 costs twice the fewest examples, 0.1 costs 10 % more
                than the fewest.
            price_per_device_hour: In any currency, for what other batch sizes would cost.

        Raises:
            ValueError: If there are several optimizers and none is named, or a number is not positive.
        """
        index = self._measurements.index_of(optimizer)
        return self._watch.advise(
            self._measurements[index], index, target=target, price_per_device_hour=price_per_device_hour
        )

    def plot(
        self, optimizer: int | None = None, *, target: float = 1.0, theme: Literal["light", "dark"] = "light"
    ) -> Figure:
        """Draw what was measured and what it advises, in four panels; see :func:`~.run_figure.plot_run`.

        Args:
            optimizer: Position among the LightningModule's optimizers; None is the only one.
            target: As in :meth:`advise`.
            theme: ``"dark"`` is for a dark page; ``"light"`` takes matplotlib's own settings.

        Returns:
            A matplotlib figure; ``figure.savefig("noise_scale.png")`` writes it.

        Raises:
            ModuleNotFoundError: If matplotlib is missing; ``pip install "lightning-wn[plots]"`` brings it.
            ValueError: If nothing was measured yet, or as in :meth:`advise`.
        """
        index = self._measurements.index_of(optimizer)
        return self._log.plot(index, self.advise(index, target=target), theme)

    def reset(self) -> None:
        """Forget all measurements, for instance after a change of the learning rate; on every rank."""
        self._measurements.reset()

    @property
    def micro_batch_size(self) -> float:
        """Size of one micro-batch of all ranks together, in ``unit``; NaN before the first measurement.

        Of the last full optimizer step that was measured, as of the last synchronisation.
        """
        return self._measurements.micro_batch_size
