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
    """

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []

    def begin(self, module: nn.Module) -> None:
        """Open the scope if it is not open."""
        if not self._layers:
            self._layers = open_scope(module)

    def end_if_last(self, trainer: pl.Trainer) -> None:
        """Close the scope if the loop has no batch after this one, as far as Lightning knows."""
        loop: Any = trainer._active_loop
        if loop.batch_progress.is_last_batch:
            self.end()

    def end(self) -> None:
        """Close the scope if it is open."""
        close_scope(self._layers)
        self._layers = []
