"""Whether the examples of the batch that training has just used mix, looked at on a copy of the LightningModule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_wn.per_example.engine.layers import BatchDim
from lightning_wn.per_example.mixing.report import Mixing, MixingReport
from lightning_wn.per_example.mixing.search import find_mixing
from lightning_wn.per_example.rules.errors import MixedExamplesError
from lightning_wn.probes.silent_copy import silence
from lightning_wn.trainer import copy_without_trainer, loss_scale, training_step_output

MAX_CHECKS = 10


@dataclass(frozen=True)
class _Seen:
    """A batch as ``training_step`` gets it, with the state of its tensors' memory then."""

    trainer: Trainer
    model: LightningModule
    batch: Any
    versions: list[int]
    batch_idx: int


class MixingCheck:
    """Keeps the batch of a measured step until it is known whether that has to be looked at.

    Attributes:
        unchecked: Why a look said nothing, empty as long as all did.
    """

    def __init__(self) -> None:
        self.unchecked = ""
        self._seen: _Seen | None = None
        self._checks = 0

    def see_batch(self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch; no tensor is copied."""
        # other containers than the user's, which `training_step` may empty
        batch = pytree.tree_map(lambda leaf: leaf, batch)
        self._seen = _Seen(trainer, model, batch, _versions(batch), batch_idx)

    def require_separate(self, batch_size: int, dims: Mapping[str, BatchDim | None]) -> None:
        """Look at the batch that was seen last, after its backward pass.

        Args:
            batch_size: B.
            dims: By layer, where the examples were taken to be.

        Raises:
            MixedExamplesError: If its examples mix.
        """
        seen, self._seen = self._seen, None
        if seen is None:  # a probe that is used without a Trainer
            return
        self._checks += 1
        report = self._look(seen, batch_size, dims)
        if report.outcome is Mixing.MIXES:
            raise MixedExamplesError(
                f"examples mix, so that none has a gradient of its own: {report.why} (found by the test "
                f"{report.test!r}): compute each example from its own data, or choose another probe"
            )
        if report.outcome is Mixing.UNKNOWN:
            self.unchecked = self.unchecked or report.why

    def _look(self, seen: _Seen, batch_size: int, dims: Mapping[str, BatchDim | None]) -> MixingReport:
        why = ""
        if _versions(seen.batch) != seen.versions:
            why = "`training_step` changes its batch in place"
        elif self._checks > MAX_CHECKS:
            why = f"the model uses its layers in more than {MAX_CHECKS} ways"
        if why:
            return MixingReport(outcome=Mixing.UNKNOWN, why=why)

        def loss(model: nn.Module, batch: Any) -> Any:
            assert isinstance(model, LightningModule)
            return _loss_of_step(seen.trainer, model, batch, seen.batch_idx)

        return find_mixing(seen.model, loss, seen.batch, batch_size, batch_dims=dims, copier=copy_without_trainer)


def _loss_of_step(trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int) -> Tensor | None:
    """Return the loss of a copy as it is back-propagated in training, without a trace in logs."""
    silence(model, trainer)
    if not model.automatic_optimization:
        optimizer: Any = _Idle()
        vars(model).update(
            manual_backward=_stop_with, optimizers=lambda *args, **kwargs: optimizer, lr_schedulers=lambda: optimizer
        )
    with trainer.precision_plugin.train_step_context():
        try:
            output = training_step_output(model, batch, batch_idx)
        except _LossReachedError as reached:
            output = reached.loss
    loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else output
    scale = loss_scale(trainer, model.device)
    return loss if scale is None or loss is None else loss * scale


class _LossReachedError(BaseException):
    """``manual_backward`` was called; no `except Exception` of the user's stops it."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss


def _stop_with(loss: Tensor, *args: Any, **kwargs: Any) -> None:
    raise _LossReachedError(loss)


class _Idle:
    """Stands for an optimizer or a scheduler of a copy, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return _nothing

    @contextlib.contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Toggle nothing."""
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for what would leave a trace."""


def _versions(batch: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
