"""The callbacks beside ours in a Trainer."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Return the Trainer's callbacks, in the order in which their hooks run.

    Example:
        >>> callbacks_of(pl.Trainer(logger=False, barebones=True, callbacks=[Callback()]))[0].state_key
        'Callback'
    """
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
