"""One check: that the Trainer comes from the package that these callbacks are written for."""

from __future__ import annotations


def require_lightning_trainer(trainer: object, callback_name: str) -> None:
    """Raise TypeError for a Trainer of ``pytorch_lightning``, whose classes are not ``lightning.pytorch``'s.

    Args:
        trainer: The trainer that called the callback.
        callback_name: Name of the callback, for the message.
    """
    if type(trainer).__module__.split(".")[0] == "pytorch_lightning":
        raise TypeError(
            f"`{callback_name}` works with `lightning.pytorch.Trainer`, got a Trainer of `pytorch_lightning`, whose "
            "strategies are other classes; write `import lightning.pytorch as pl` instead of "
            "`import pytorch_lightning as pl`."
        )
