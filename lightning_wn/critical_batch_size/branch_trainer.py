"""Trains branches with Trainers of their own, and leaves everything else as it was."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.compile import from_compiled
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch._dynamo import OptimizedModule
from torch.nn.parameter import is_lazy

from lightning_wn.arguments import is_between
from lightning_wn.critical_batch_size.branch import Branch, BranchPlan
from lightning_wn.critical_batch_size.branch_schedule import BranchSchedule, PlannedTrainer
from lightning_wn.critical_batch_size.branch_watch import BranchWatch, monitored_value
from lightning_wn.critical_batch_size.experiment import Sweep, Target, window_shape
from lightning_wn.critical_batch_size.isolation import (
    copy_each,
    only_warnings_are_told,
    own_copy,
    own_random_state,
    require_callbacks_in_place,
)
from lightning_wn.noise_scale.batch_counting import BatchSizeFn, count_examples
from lightning_wn.trainer import copy_without_trainer

_OURS = (
    "max_epochs", "max_time", "min_steps", "min_epochs", "accumulate_grad_batches", "fast_dev_run",
    "logger", "enable_checkpointing", "enable_progress_bar", "barebones",
)  # fmt: skip
_TELLING = (
    "precision", "plugins", "gradient_clip_val", "gradient_clip_algorithm", "max_steps", "limit_train_batches",
    "overfit_batches", "sync_batchnorm",
)  # fmt: skip
"""Arguments of the Trainer that change what a branch comes to; those on devices and logging do not."""
_NEVER = 10**9
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""Where a function lies in memory, which is elsewhere in the next process."""


@dataclass(frozen=True, kw_only=True)
class BranchTrainer:
    """What all branches have in common.

    Attributes:
        sweep: Which branches there are.
        target: What they are judged by, and where they may end.
        model: A model, copied for each branch, or a function that makes one.
        data: Loaders or a DataModule, copied for each branch, or a function from a micro-batch size to these.
        val_dataloaders: For validation, if a monitored metric asks for it and no DataModule has them.
        ckpt_path: A checkpoint from which each branch goes on.
        weights_only: As ``Trainer.fit`` has it.
        max_micro_batch: Most examples that a rank has room for, where ``data`` is a function.
        batch_size_fn: From a batch to its number of examples.
        trainer_kwargs: Further arguments of the Trainers.
        directory: Their root directory.
    """

    sweep: Sweep
    target: Target
    model: LightningModule | Callable[[], LightningModule]
    data: Any
    val_dataloaders: Any = None
    ckpt_path: str | None = None
    weights_only: bool = False
    max_micro_batch: int | None = None
    batch_size_fn: BatchSizeFn | None = None
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    directory: str = "."

    def __post_init__(self) -> None:
        """Check the arguments of the Trainers."""
        wrong = [name for name in _OURS if name in self.trainer_kwargs]
        if wrong:
            raise ValueError(
                f"`trainer_kwargs` must leave out {wrong}, which are set for each branch; the length of a branch is "
                "`num_examples`."
            )
        if self.max_micro_batch is not None and not is_between(self.max_micro_batch, 0):
            raise ValueError(
                f"`max_micro_batch` must be a positive number, or None for no limit, got {self.max_micro_batch!r}."
            )
        if self.max_micro_batch is not None and not callable(self.data):
            raise ValueError(
                "`max_micro_batch` is for `data` that is a function from a micro-batch size, got "
                f"{type(self.data).__name__}, whose batches are as large as they are; leave it out."
            )
        require_callbacks_in_place(self._callbacks, "`trainer_kwargs['callbacks']`")
        if self.ckpt_path is not None and not Path(self.ckpt_path).is_file():
            raise ValueError(
                f"`ckpt_path` must be a checkpoint file, got {self.ckpt_path!r}; checkpoints that are folders, as of "
                "sharded training, are not read."
            )

    def fresh_model(self, seed: int) -> LightningModule:
        """Return a model for a branch.

        Raises:
            ValueError: If it is none, or optimizes by hand.
        """
        made: object = self.model
        made = made._orig_mod if isinstance(made, OptimizedModule) else made
        if isinstance(made, LightningModule):
            made = own_copy(made, "model")
        elif callable(made) and not isinstance(made, torch.nn.Module):
            made = made()
            made = from_compiled(made) if isinstance(made, OptimizedModule) else made
        if not isinstance(made, LightningModule):
            raise ValueError(
                f"`model` must be a `lightning.pytorch.LightningModule` or a function that returns one, got "
                f"{type(made).__name__}."
            )
        if not made.automatic_optimization:
            raise ValueError(
                f"`model` must leave the optimization to the Trainer, and {type(made).__name__} has "
                "`automatic_optimization = False`: its batch size and learning rate cannot be changed from outside."
            )
        if self.target.monitor is not None and not is_overridden("validation_step", made):
            raise ValueError(
                f"`monitor={self.target.monitor!r}` needs validation, and {type(made).__name__} has no "
                "`validation_step`; write one that logs it, or leave `monitor` out for the training loss."
            )
        return made

    def window_shapes(self) -> dict[int, tuple[int, int]]:
        """Return the examples in a micro-batch and the micro-batches in an optimizer step, by batch size.

        Raises:
            ValueError: If the data cannot give a batch size, or the checkpoint is where no window begins.
        """
        with only_warnings_are_told(), own_random_state():
            micro_batch, ranks = self._find_micro_batch()
        shapes = {size: window_shape(size, micro_batch, ranks, self.max_micro_batch) for size in self.sweep.batch_sizes}
        self._require_start([accumulate for _, accumulate in shapes.values()])
        return shapes

    def _find_micro_batch(self) -> tuple[int | None, int]:
        """Return the examples in a micro-batch of the data, None where a function makes it to order, and the ranks."""
        trainer = self._trainer({})
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "`trainer_kwargs` must not ask for a strategy that trains in spawned or forked processes, whose "
                "results are lost with them; use `strategy='ddp'` in a script, or `devices=1`."
            )
        if callable(self.data):
            return None, trainer.world_size
        data = own_copy(self.data, "data")
        if isinstance(data, LightningDataModule):
            data.trainer = trainer  # as in a fit
            data.prepare_data()
            data.setup("fit")
            data = data.train_dataloader()
        # several loaders in a list or dictionary are combined as in a fit
        loader = data if isinstance(data, CombinedLoader) else CombinedLoader(data, "max_size_cycle")
        batch, _, _ = next(iter(loader))
        return int(count_examples(batch, self.batch_size_fn).total), trainer.world_size

    def run(
        self,
        plan: BranchPlan,
        *,
        micro_batch: int,
        accumulate: int,
        most_steps: float = math.inf,
        on_progress: Callable[[float, float], None] = lambda examples, loss: None,
    ) -> Branch:
        """Train a branch.

        Args:
            plan: Which one.
            micro_batch: Examples in a micro-batch of one rank.
            accumulate: Micro-batches in an optimizer step.
            most_steps: No more optimizer steps than that.
            on_progress: Told the examples so far and the last loss.
        """
        schedule = BranchSchedule(
            batch_size=plan.batch_size,
            base_batch_size=self.sweep.base,
            micro_batch=micro_batch,
            num_examples=self.sweep.num_examples,
            resumes=self.ckpt_path is not None,
            batch_size_fn=self.batch_size_fn,
        )
        watch = BranchWatch(
            schedule,
            rate_factor=self.sweep.rule_factor(plan.batch_size) * plan.learning_rate_factor,
            first_batch=micro_batch if callable(self.data) and self.batch_size_fn is None else None,
            target_loss=self.target.loss,
            most_steps=most_steps,
            monitor=self.target.monitor,
            batch_size_fn=self.batch_size_fn,
            on_progress=on_progress,
        )
        with only_warnings_are_told(), own_random_state():
            seed_everything(plan.seed, workers=True, verbose=False)
            model = self.fresh_model(plan.seed)
            data = self.data(micro_batch) if callable(self.data) else own_copy(self.data, "data")
            trainer = self._trainer({"accumulate_grad_batches": accumulate}, watch)
            is_module = isinstance(data, LightningDataModule)
            loaders: dict[str, Any] = {"datamodule" if is_module else "train_dataloaders": data}
            validation = {} if is_module else {"val_dataloaders": copy_without_trainer(self.val_dataloaders)}
            trainer.fit(model, **loaders, **validation, ckpt_path=self.ckpt_path, weights_only=self.weights_only)
            if not trainer.state.finished:
                raise RuntimeError(f"The branch {plan.name} was interrupted, and will be trained anew next time.")
            watch.require_end(plan.name)
            if self.target.monitor is not None and self.target.loss is None and not watch.diverged:
                arguments = {"datamodule": data} if is_module else {"dataloaders": validation["val_dataloaders"]}
                found = trainer.validate(model, **arguments, verbose=False)
                watch.add_monitored(
                    monitored_value({k: v for part in found for k, v in part.items()}, self.target.monitor)
                )
        return Branch(
            plan=plan,
            curve=watch.curve,
            smoothing=watch.smoothing,
            diverged=watch.diverged,
            noise_scales=tuple(watch.noise_scales),
            given_up=watch.given_up,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this experiment from others: the model's class, sizes, weights, hyper-parameters."""
        with only_warnings_are_told(), own_random_state():
            seed_everything(0, workers=True, verbose=False)
            model = self.fresh_model(0)
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            if isinstance(tensor, Tensor) and not tensor.is_meta and not is_lazy(tensor):
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return {
            "model": type(model).__name__,
            "weights": digest.hexdigest()[:16],
            "hparams": {str(name): _ADDRESS.sub("", str(value)) for name, value in model.hparams.items()},
            "num_examples": self.sweep.num_examples,
            "target_loss": self.target.loss,
            "monitor": self.target.monitor,
            "ckpt_path": None if self.ckpt_path is None else _file_digest(Path(self.ckpt_path)),
            "learning_rate": self.sweep.learning_rate,
            "base_batch_size": self.sweep.base,
        } | {
            f"trainer_kwargs[{name!r}]": _ADDRESS.sub("", str(self.trainer_kwargs[name]))
            for name in _TELLING
            if self.trainer_kwargs.get(name) is not None
        }

    def _trainer(self, arguments: dict[str, Any], *watches: pl.Callback) -> PlannedTrainer:
        given = {name: copy_each(value) for name, value in self.trainer_kwargs.items() if name != "callbacks"}
        settings: dict[str, Any] = {"default_root_dir": self.directory, "enable_model_summary": False}
        if self.target.monitor is None:
            settings["limit_val_batches"] = 0
        elif self.target.loss is None:  # it is validated once, after the branch
            settings |= {"check_val_every_n_epoch": None, "val_check_interval": _NEVER}
        return PlannedTrainer(
            **settings
            | given
            | arguments
            | {
                "max_epochs": -1,
                # the watch comes last, to see what the others did
                "callbacks": [*copy_each(self._callbacks), *watches],
                "logger": DummyLogger(),  # takes what models hand to `self.logger.experiment`, and drops it
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "num_sanity_val_steps": 0,
            }
        )

    @property
    def _callbacks(self) -> list[pl.Callback]:
        given = self.trainer_kwargs.get("callbacks") or []
        return [given] if isinstance(given, pl.Callback) else list(given)

    def _require_start(self, accumulate: Sequence[int]) -> None:
        """Raise ValueError where training cannot go on behind the checkpoint with windows of so many micro-batches."""
        if self.ckpt_path is None:
            return
        # the file is mapped: only what is looked at is read
        checkpoint = torch.load(self.ckpt_path, map_location="cpu", mmap=True, weights_only=self.weights_only)
        if not isinstance(checkpoint, dict) or not {"loops", "optimizer_states"} <= checkpoint.keys():
            raise ValueError(
                f"`ckpt_path` {self.ckpt_path!r} holds no state of a Trainer and its optimizer to go on from; save it "
                "without `save_weights_only=True`, or load the weights into `model` and leave `ckpt_path` out."
            )
        most = int(self.trainer_kwargs.get("max_steps", -1))
        if 0 <= most <= checkpoint["global_step"]:
            raise ValueError(
                f"`trainer_kwargs['max_steps']` must be beyond the {checkpoint['global_step']} steps of `ckpt_path`, "
                f"got {most}; it is the length of the run that you mean, from its beginning."
            )
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches = 0 if progress["is_last_batch"] else progress["current"]["ready"]
        for window in accumulate:
            if batches % window:
                raise ValueError(
                    f"`ckpt_path` {self.ckpt_path!r} was saved after {batches} batches of an epoch, where no window of "
                    f"{window} micro-batches begins; pass a checkpoint from the end of an epoch, or make `data` a "
                    "function from the micro-batch size to a DataLoader, which needs no accumulation."
                )


def _file_digest(path: Path) -> str:
    """Return the beginning, the end and the size of a file as one short text; the whole may be many gigabytes."""
    megabyte = 2**20
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        digest.update(file.read(megabyte))
        file.seek(max(path.stat().st_size - megabyte, 0))
        digest.update(file.read())
    return digest.hexdigest()[:16]
