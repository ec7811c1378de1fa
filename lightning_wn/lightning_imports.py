"""Which of the two Lightning packages a Trainer comes from."""

from __future__ import annotations

import lightning.pytorch as pl


def require_lightning_trainer(trainer: object, callback_name: str) -> None:
    """Raise if the Trainer is ``pytorch_lightning``'s, whose classes are not ``lightning.pytorch``'s.

    The two packages hold the same code under two names, so a callback of one runs in a Trainer of the
    other and every ``isinstance`` in it silently says no.

    Args:
        trainer: The Trainer that calls the callback.
        callback_name: The callback's name for the error.

    Raises:
        TypeError: If the Trainer's class comes from ``pytorch_lightning``.

    Example:
        >>> require_lightning_trainer(pl.Trainer(logger=False, barebones=True), "MyCallback")
    """
    if isinstance(trainer, pl.Trainer):
        return
    if any(cls.__module__.partition(".")[0] == "pytorch_lightning" for cls in type(trainer).__mro__):
        raise TypeError(
            f"{callback_name} is a `lightning.pytorch` callback and cannot work in a Trainer from the "
            "package `pytorch_lightning`, whose classes are different ones: write "
            "`import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`, for the Trainer "
            "and for the LightningModule."
        )
