"""The part of an evaluation loop in which weights stand still."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_wn.weight_norm.core.cache import close_scope, open_scope


class EvaluationScope:
    """Keeps computed weights from a loop's first batch to its last.

    Between the two, and not longer, averaged weights are in the model: they are swapped in by hooks at the
    start of the loop and out by hooks at its end, by copies that leave no trace.

    Example:
        >>> from lightning_wn import apply_weight_norm
        >>> layer, scope = nn.Linear(2, 2), EvaluationScope()
        >>> names = apply_weight_norm(layer)
        >>> scope.begin(layer), scope.end()
        (None, None)
    """

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []

    def begin(self, module: nn.Module) -> None:
        """Open the scope if it is not open."""
        if not self._layers:
            self._layers = open_scope(module)

    def end_if_last(self, trainer: pl.Trainer) -> None:
        """Close the scope if the loop has no batch after this one."""
        if _is_last_batch(trainer):
            self.end()

    def end(self) -> None:
        """Close the scope if it is open."""
        close_scope(self._layers)
        self._layers = []


def _is_last_batch(trainer: pl.Trainer) -> bool:
    """Tell whether the running evaluation loop has no batch after this one, as far as Lightning knows."""
    loop: Any
    if trainer.predicting:
        loop = trainer.predict_loop
    elif trainer.testing:
        loop = trainer.test_loop
    else:
        loop = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else trainer.validate_loop
    return bool(loop.batch_progress.is_last_batch)
