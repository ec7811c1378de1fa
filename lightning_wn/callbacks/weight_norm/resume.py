"""Exact resuming of a fit: when g and v go into checkpoints, and when the model and its copies get them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_wn.text import some
from lightning_wn.trainer import callbacks_of
from lightning_wn.weight_norm.checkpoint.exact_resume import KEY, Parts, collect, restore


def model_copies(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
    """Return the model and the copies of it that callbacks keep, such as its average, by a name for each."""
    copies: dict[str, nn.Module] = {"model": pl_module}
    for callback in callbacks_of(trainer):
        for name, value in vars(callback).items():
            if isinstance(value, nn.Module) and value is not pl_module:
                copies[f"{callback.state_key}.{name}"] = value
    return copies


class ExactResume:
    """Saves g and v with a checkpoint, and gives them back after everyone has loaded weights from it.

    Callbacks that keep a copy of the model may load theirs, and the model's, after ours was called, so that
    g and v are given back more than once: at once, and until the first batch.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Parts] | None = None

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put g and v under a key of the checkpoint, if it holds plain weights."""
        found = {label: collect(copy) for label, copy in model_copies(trainer, pl_module).items()}
        if found := {label: parts for label, parts in found.items() if parts}:
            checkpoint.setdefault(KEY, {}).update(found)

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Remember what :meth:`save` put there."""
        self._loaded = checkpoint.get(KEY)

    def restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last: bool = False) -> None:
        """Set g and v of the model and its copies to those of the weights that they have."""
        if self._loaded is None:
            return
        for label, copy in model_copies(trainer, pl_module).items():
            others = [parts for other, parts in self._loaded.items() if other != label]
            mismatches = restore(copy, [self._loaded.get(label, {}), *others])
            if last and label == "model" and mismatches:
                rank_zero_warn(
                    f"The checkpoint holds {some(mismatches)} that are not those of its weights, as if these had been "
                    "edited. The weights were loaded, with a new g and v: the optimizer's state for them is of others."
                )
        if last:
            self.forget()

    def forget(self) -> None:
        """Give up what was loaded."""
        self._loaded = None
