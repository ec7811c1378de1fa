"""The callback that weight-normalizes a LightningModule before its optimizers exist."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.hooks import RemovableHandle

from lightning_wn.lightning_imports import require_lightning_trainer
from lightning_wn.module_selectors import ModuleSelection, ModuleSelector, as_selectors
from lightning_wn.weight_norm.checkpoint import fold_on_load
from lightning_wn.weight_norm.first_batch import FirstBatch, check_init
from lightning_wn.weight_norm.mean_only_batch_norm import (
    attach,
    check_momentum,
    refuse_missing_mean_only,
    refuse_without_bias,
)
from lightning_wn.weight_norm.optimizers import check_optimizers
from lightning_wn.weight_norm.reparametrization import Dim, check_dim, fold, plain_tensors, rewrite
from lightning_wn.weight_norm.selection import NamedLayer, Selection, select

# callbacks of Lightning that copy the model in their own `setup`, and later pair parameters by position
_COPIES_MODEL = ("WeightAveraging", "StochasticWeightAveraging")


class WeightNormCallback(Callback):
    r"""Train a model with weight normalization, w = g · v/‖v‖ (Salimans & Kingma, arXiv 1602.07868).

    At the start of ``fit`` each selected weight is replaced by its length g, one number per output unit, and
    its direction v, before optimizers and DDP see the parameters. The function that the model computes does
    not change by it, bit for bit; see :func:`~lightning_wn.weight_norm.apply_weight_norm` for what is
    replaced by what. Nothing else in the LightningModule has to change: ``configure_optimizers`` finds g and
    v in ``self.parameters()``.

    - The model stays weight-normalized after ``fit``;
      :func:`~lightning_wn.weight_norm.fold_weight_norm` gives plain weights back. Only strategies that train
      in processes of their own and send the weights home (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``)
      bring back a plain model, with the trained weights.
    - Checkpoints hold g and v. ``fit(ckpt_path=...)`` resumes from them, and ``validate``, ``test`` and
      ``predict`` read them, also into a plain model in a new process if this callback is in its Trainer.
    - Layers may be built in ``__init__`` or ``configure_model``, which is called early for it and has to be
      idempotent, as Lightning asks. Layers built in ``LightningModule.setup`` come too late for the
      callback: that is an error, unless ``setup`` ends with ``apply_weight_norm(self)``.
    - Before the first step the optimizers are checked to hold every trainable g and v, and no weight that
      was replaced.
    - Put it before ``WeightAveraging`` and ``StochasticWeightAveraging``, which copy the model. They average
      g and v, each by itself.
    - Single-device and DDP strategies are supported; sharded parameters are refused.
    - With ``init="data"`` the first training batch sets g and b so that each unit's pre-activation has mean 0
      and variance 1, layer after layer: see
      :class:`~lightning_wn.weight_norm.initialization.DataDependentInitialization`. That batch is the first
      micro-batch of gradient accumulation, of all ranks together. No extra forward pass is run, and nothing is
      set when ``fit`` resumes from a checkpoint or goes on with a model that was set before. A layer that the
      batch does not reach keeps g and b, with a warning. ``LearningRateFinder`` and ``BatchSizeFinder`` run
      before it, with the model as it was.
    - ``mean_only_batch_norm=True`` puts a :class:`~lightning_wn.weight_norm.MeanOnlyBatchNorm` behind each
      Linear and convolution: see :func:`~lightning_wn.weight_norm.add_mean_only_batch_norm`. To spare some
      layers, such as the last, give them a callback of their own.

    Args:
        modules: What to normalize. None means Linear, Conv1-3d and ConvTranspose1-3d; else a type, a glob on
            qualified names, a predicate ``(name, module) -> bool``, or a list of these.
        exclude: What to leave alone, said in the same ways.
        init: "keep" leaves the function that the model computes as it is; "data" sets g and b from the first
            training batch.
        dim: "output" gives each output unit a length of its own; None gives each weight one.
        mean_only_batch_norm: Whether layers subtract the mean of their outputs over the batch.
        mean_only_momentum: How far its running means move towards the mean of each batch, in (0, 1].
        mean_only_synchronize: Whether it takes means over the batches of all ranks, and not of each rank.

    Raises:
        TypeError: If an entry of ``modules`` or ``exclude`` is of a wrong type.
        ValueError: If another argument is not one of what is allowed.

    Example::

        trainer = pl.Trainer(callbacks=[WeightNormCallback()])
        trainer.fit(model, data)

    or, for the decoder and the tied embedding of a language model::

        WeightNormCallback(modules=["decoder.*", nn.Embedding, "head"], exclude="*.gate")

    or in the YAML file of a LightningCLI, where types and globs can be written::

        trainer:
          callbacks:
            - class_path: lightning_wn.weight_norm.WeightNormCallback
              init_args:
                modules: ["decoder.*", torch.nn.Embedding, head]
                exclude: ["*.gate"]
    """

    def __init__(
        self,
        modules: Sequence[ModuleSelector] | ModuleSelector | None = None,
        *,
        exclude: Sequence[ModuleSelector] | ModuleSelector = (),
        init: Literal["keep", "data"] = "keep",
        dim: Dim = "output",
        mean_only_batch_norm: bool = False,
        mean_only_momentum: float = 0.1,
        mean_only_synchronize: bool = False,
    ) -> None:
        if modules is not None:
            as_selectors("modules", modules)
        as_selectors("exclude", exclude)
        check_init(init, dim)
        check_dim(dim)
        check_momentum("mean_only_momentum", mean_only_momentum)
        self.modules: ModuleSelection | None = modules
        self.exclude: ModuleSelection = exclude
        self.init: Literal["keep", "data"] = init
        self.dim: Dim = dim
        self.mean_only_batch_norm = mean_only_batch_norm
        self.mean_only_momentum = mean_only_momentum
        self.mean_only_synchronize = mean_only_synchronize
        # only while a fit waits for its first batch
        self._first_batch: FirstBatch | None = None
        # names, and not modules: the callback has to be picklable for spawned processes
        self._rewritten: list[str] = []
        self._load_hooks: list[RemovableHandle] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Rewrite the layers when ``fit`` begins; otherwise see that checkpoints of g and v can be read."""
        require_lightning_trainer(trainer, type(self).__name__)
        self._remove_load_hooks()
        if stage == "fit":
            _refuse_sharding(trainer)
        _configure_model(trainer, pl_module)
        selection = self._select(pl_module)
        if stage != "fit":
            self._load_hooks = fold_on_load(selection.layers)
            return
        # what matches nothing may still match a layer that `LightningModule.setup` builds: see `on_fit_start`
        if _plain(selection):
            self._refuse_copied_model(trainer)
        self._rewritten = rewrite(pl_module, selection.layers, self.dim)
        if self._rewritten:
            rank_zero_info(f"{type(self).__name__} weight-normalized {len(self._rewritten)} of the model's layers.")
        if self.mean_only_batch_norm:
            if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
                refuse_without_bias(selection.layers, type(trainer.strategy).__name__)
            attach(selection.layers, momentum=self.mean_only_momentum, synchronize=self.mean_only_synchronize)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that every selected layer is normalized and in the hands of an optimizer."""
        self._check(trainer, pl_module)
        self._first_batch = None
        if self.init == "data":
            self._first_batch = FirstBatch.of(trainer, self._select(pl_module).layers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check again, after the ``on_fit_start`` hooks of the model and of other callbacks."""
        self._check(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the first batch initialize the layers that it runs through."""
        if self._first_batch is not None:
            self._first_batch.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say what the first batch initialized."""
        if self._first_batch is not None:
            self._first_batch.end()
            self._first_batch = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not wait on inside validation for a batch that was skipped."""
        if self._first_batch is not None:
            self._first_batch.pause()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complain if no batch came to initialize from."""
        if self._first_batch is not None:
            self._first_batch.refuse_empty_fit(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Clean up: ``teardown`` is not called after an exception."""
        if self._first_batch is not None:
            self._first_batch.cancel()
            self._first_batch = None
        self._remove_load_hooks()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fold in a worker process, whose state the launcher then loads into the plain model at home."""
        self._remove_load_hooks()
        if stage == "fit" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            # only what was rewritten here is plain at home
            fold(NamedLayer((name,), pl_module.get_submodule(name)) for name in self._rewritten)
        self._rewritten = []

    def _select(self, pl_module: pl.LightningModule) -> Selection:
        return select(pl_module, self.modules, self.exclude)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = type(self).__name__
        selection = self._select(pl_module)
        if selection.misses:
            raise ValueError(
                f"{name}: {' '.join(selection.misses)} Layers have to exist when training starts: build them "
                "in `__init__` or `configure_model`."
            )
        if late := _plain(selection):
            raise ValueError(
                f"{', '.join(map(str, late))} would train without weight normalization, because {name} "
                "rewrites the model before `LightningModule.setup` and later hooks run: build layers in "
                "`__init__` or `configure_model`, or end `LightningModule.setup` with "
                "`apply_weight_norm(self)`, or exclude them."
            )
        if self.mean_only_batch_norm:
            refuse_missing_mean_only(selection.layers)
        check_optimizers(trainer.optimizers, selection.layers)

    def _refuse_copied_model(self, trainer: pl.Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        for callback in takewhile(lambda other: other is not self, callbacks):
            bases = [cls for cls in type(callback).__mro__ if cls.__module__.startswith("lightning.")]
            if any(cls.__name__ in _COPIES_MODEL for cls in bases):
                raise ValueError(
                    f"{type(callback).__name__} is listed before {type(self).__name__} and has copied "
                    f"the plain model already, so that its averages would be of other parameters: list "
                    f"{type(self).__name__} first."
                )

    def _remove_load_hooks(self) -> None:
        for handle in self._load_hooks:
            handle.remove()
        self._load_hooks = []


def _plain(selection: Selection) -> list[NamedLayer]:
    return [layer for layer in selection.layers if plain_tensors(layer.module)]


def _refuse_sharding(trainer: pl.Trainer) -> None:
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"Weight normalization does not work with {type(trainer.strategy).__name__}, which shards or "
            "flattens the parameters of which the norms are taken: use a single device or a DDP strategy."
        )


def _configure_model(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Build the layers of ``configure_model`` now, in the contexts in which the Trainer calls it later."""
    if is_overridden("configure_model", pl_module):
        with (
            trainer.strategy.tensor_init_context(),
            trainer.strategy.model_sharded_context(),
            trainer.precision_plugin.module_init_context(),
        ):
            pl_module.configure_model()
