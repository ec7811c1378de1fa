"""The first training batch of a fit, which initializes the model's weight-normalized layers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_wn.text import some
from lightning_wn.weight_norm.core.normalized_module import normalized_weights, weight_norm_in, weight_norm_of
from lightning_wn.weight_norm.core.selection import NamedLayer
from lightning_wn.weight_norm.initialization import DataDependentInitialization, can_initialize


class FirstBatch:
    """Runs :class:`DataDependentInitialization` for the length of one training batch.

    Args:
        layers: The layers to initialize.
    """

    def __init__(self, layers: Iterable[NamedLayer]) -> None:
        self._layers = list(layers)
        self._initialization = DataDependentInitialization(self._layers)

    @classmethod
    def of(cls, trainer: pl.Trainer, layers: Iterable[NamedLayer]) -> FirstBatch | None:
        """Wait for the first batch of a fit that starts, unless it resumes or a batch initialized all layers before."""
        if _resumes(trainer):
            return None
        fresh = [layer for layer in layers if _is_fresh(layer)]
        return cls(fresh) if fresh else None

    def start(self) -> None:
        """Wait for the layers to be called."""
        self._initialization.attach()

    def pause(self) -> None:
        """Let calls pass."""
        self._initialization.detach()

    def end(self) -> None:
        """Go back to ordinary training, and say what was done."""
        self._initialization.detach()
        for layer in self._layers:
            weight_norm_in(normalized_weights(layer.module)["weight"]).saw_first_batch = True
        report = self._initialization.report()
        rank_zero_info(
            f"The first batch initialized {len(report.initialized)} of {len(self._layers)} weight-normalized layers."
        )
        if report.unreached:
            rank_zero_warn(
                f"Data-dependent initialization: the first batch did not call {some(map(repr, report.unreached))}, "
                "and g and b are as they were there. If they are used later in training, let the first "
                "`training_step` run them; if they never are called, because other code reads their weights, name "
                "them in `exclude`."
            )

    def cancel(self) -> None:
        """Give g and b their values back."""
        self._initialization.detach()
        self._initialization.restore()

    def require_batch(self, trainer: pl.Trainer) -> None:
        """Raise if the fit ended without a batch though it was allowed steps."""
        limit_reached = trainer.global_step == trainer.max_steps or trainer.max_epochs == 0
        if not (limit_reached or trainer.should_stop):
            raise ValueError(
                'Data-dependent initialization, `init="data"`, needs a training batch, but the training data yielded '
                'none: look at the dataset\'s length, `drop_last` and `limit_train_batches`, or take `init="keep"`.'
            )


def check_init(init: str, dim: str | None) -> None:
    """Raise unless this is a way to initialize, and possible with this ``dim``."""
    if init not in ("keep", "data"):
        raise ValueError(
            f'`init` got {init!r}, but it must be "keep", which leaves the model\'s function as it is, or "data", '
            "which sets g and b from the first training batch."
        )
    if init == "data" and dim is None:
        raise ValueError(
            '`init="data"` sets the variance of each unit, and with `dim=None` the units of a weight have one length '
            'together: take `dim="output"`, or `init="keep"`.'
        )


def _resumes(trainer: pl.Trainer) -> bool:
    # the finders restore the model from a file of their own, which Lightning then takes for the fit's
    path = trainer.ckpt_path
    return path is not None and not Path(path).name.startswith((".lr_find_", ".scale_batch_size_"))


def _is_fresh(layer: NamedLayer) -> bool:
    weight_norm = weight_norm_of(layer.module)
    return weight_norm is not None and not weight_norm.saw_first_batch and can_initialize(layer.module)
