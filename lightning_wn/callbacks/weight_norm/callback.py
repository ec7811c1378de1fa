"""The callback that weight-normalizes a LightningModule before its optimizers exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.hooks import RemovableHandle

from lightning_wn.callbacks.weight_norm.checks import (
    require_averaged_means,
    require_form_for_shards,
    require_in_optimizers,
    require_no_earlier_copy,
    require_one_form,
    require_whole_parameters,
)
from lightning_wn.callbacks.weight_norm.evaluation import EvaluationScope
from lightning_wn.callbacks.weight_norm.first_batch import FirstBatch, check_init
from lightning_wn.callbacks.weight_norm.resume import ExactResume, model_copies
from lightning_wn.callbacks.weight_norm.signals import SignalLog
from lightning_wn.module_selectors import ModuleSelection, ModuleSelector, as_selectors
from lightning_wn.text import some
from lightning_wn.trainer import require_lightning_trainer
from lightning_wn.weight_norm.apply_and_fold import Dim, check_dim, fold, plain_tensors, rewrite
from lightning_wn.weight_norm.checkpoint.checks import require_same_optimizer_state, require_same_shapes
from lightning_wn.weight_norm.checkpoint.fold_on_load import fold_on_load
from lightning_wn.weight_norm.checkpoint.state_dict import save_as_weights
from lightning_wn.weight_norm.core.mean_only_batch_norm import (
    attach,
    check_momentum,
    fold_mean,
    require_biases,
    require_mean_only,
    without_mean_only,
)
from lightning_wn.weight_norm.core.normalized_module import reshard
from lightning_wn.weight_norm.core.selection import NamedLayer, Selection, select


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
    - Checkpoints hold plain weights under their original names, so that they load without this package;
      g and v travel beside them, and ``fit(ckpt_path=...)`` resumes exactly. Any spelling can be loaded:
      plain weights, ours, and those of torch's two weight norms with any ``dim``.
    - Validation, test and predict loops compute each weight once: see
      :func:`~lightning_wn.weight_norm.cached_weight_norm`.
    - Layers may be built in ``__init__`` or ``configure_model``, which is called early for it and has to be
      idempotent, as Lightning asks. Layers built in ``LightningModule.setup`` come too late for the
      callback: that is an error, unless ``setup`` ends with ``apply_weight_norm(self)``.
    - Before the first step the optimizers are checked to hold every trainable g and v, and no weight that
      was replaced.
    - Put it before ``WeightAveraging`` and ``StochasticWeightAveraging``, which copy the model. They average
      g and v, each by itself.
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
    - Single-device and DDP strategies are supported, and FSDP2 if ``configure_model`` calls
      ``apply_weight_norm(self)`` before ``fully_shard``. FSDP1 and DeepSpeed are refused.

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
        checkpoint: What ``state_dict`` holds, of the model and in checkpoints: "folded", plain weights, or
            "parametrized", g and v in the spelling of torch's parametrizations. Sharded models need the
            latter.
        fold_on_fit_end: Give the model plain weights when ``fit`` ends.
        cache_evaluation: Whether weights stand still during a validation, test or predict loop. Pass False if
            they are changed within a step, as where averaged weights are swapped in inside
            ``validation_step``.
        log_signals: Log the effective learning rate, g and the growth of ‖v‖ as ``weight_norm/...`` at log
            steps: see :func:`~lightning_wn.callbacks.weight_norm.signals.learning_signals`. "layers" logs them for each
            layer too.

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
            - class_path: lightning_wn.WeightNormCallback
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
        checkpoint: Literal["folded", "parametrized"] = "folded",
        fold_on_fit_end: bool = False,
        cache_evaluation: bool = True,
        log_signals: bool | Literal["layers"] = False,
    ) -> None:
        if modules is not None:
            as_selectors("modules", modules)
        as_selectors("exclude", exclude)
        check_init(init, dim)
        check_dim(dim)
        check_momentum("mean_only_momentum", mean_only_momentum)
        if checkpoint not in ("folded", "parametrized"):
            raise ValueError(f'`checkpoint` must be "folded" or "parametrized", got {checkpoint!r}.')
        if log_signals not in (True, False, "layers"):
            raise ValueError(f'`log_signals` must be True, False or "layers", got {log_signals!r}.')
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
        self._centered: list[str] = []
        self._load_hooks: list[RemovableHandle] = []
        self.checkpoint = checkpoint
        self.fold_on_fit_end = fold_on_fit_end
        self.cache_evaluation = cache_evaluation
        self._scope = EvaluationScope()
        self._resume = ExactResume()
        self._signals = SignalLog(per_layer=log_signals == "layers") if log_signals else None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Rewrite the layers when ``fit`` begins; otherwise see that checkpoints of g and v can be read."""
        require_lightning_trainer(trainer, type(self).__name__)
        self._clean_up()
        if stage == "fit":
            require_whole_parameters(trainer)
            require_one_form(trainer, self, self.checkpoint)
        _configure_model(trainer, pl_module)
        selection = self._select(pl_module)
        check = pl_module.register_load_state_dict_pre_hook(require_same_shapes)  # type: ignore[no-untyped-call] # in torch
        self._load_hooks = [check]
        if stage != "fit":
            self._load_hooks += fold_on_load(selection.layers)
            return
        reshard(pl_module)
        require_form_for_shards(pl_module, self.checkpoint, self.init, fold_on_fit_end=self.fold_on_fit_end)
        # what matches nothing may still match a layer that `LightningModule.setup` builds: see `on_fit_start`
        if _plain(selection) or (self.mean_only_batch_norm and without_mean_only(selection.layers)):
            require_no_earlier_copy(trainer, self)
        self._rewritten = rewrite(pl_module, selection.layers, self.dim)
        if self._rewritten:
            rank_zero_info(f"{type(self).__name__} weight-normalized {len(self._rewritten)} of the model's layers.")
        if self.mean_only_batch_norm:
            self._add_means(trainer, selection)
        for copy in model_copies(trainer, pl_module).values():
            save_as_weights(copy.modules(), self.checkpoint == "folded")
        if self._signals is not None:
            self._signals.start(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that every selected layer is normalized and in the hands of an optimizer."""
        self._check(trainer, pl_module)
        self._resume.restore(trainer, pl_module)
        self._first_batch = None
        if self.init == "data":
            self._first_batch = FirstBatch.of(trainer, self._select(pl_module).layers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check again, after the ``on_fit_start`` hooks of the model and of other callbacks."""
        reshard(pl_module)
        self._check(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to train, with the g and v of a checkpoint that was loaded meanwhile, or with those of this batch."""
        self._scope.end()
        self._resume.restore(trainer, pl_module, last=True)
        if self._first_batch is not None:
            self._first_batch.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say what the first batch initialized; log the learning signals at log steps."""
        if self._first_batch is not None:
            self._first_batch.end()
            self._first_batch = None
        if self._signals is not None:
            self._signals.log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not wait on inside validation for a batch that was skipped."""
        if self._first_batch is not None:
            self._first_batch.pause()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complain if no batch came to initialize from."""
        if self._first_batch is not None:
            self._first_batch.require_batch(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put g and v beside the plain weights."""
        self._resume.save(trainer, pl_module, checkpoint)
        if self._signals is not None:
            self._signals.save(checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take g and v from beside the plain weights."""
        if trainer.state.fn == "fit":
            require_same_optimizer_state(pl_module, checkpoint)
        self._resume.load(checkpoint)
        self._resume.restore(trainer, pl_module)
        if self._signals is not None:
            self._signals.load(checkpoint)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let weights stand still from the first batch on."""
        if self.cache_evaluation:
            self._scope.begin(pl_module)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(  # noqa: PLR0917 # Lightning passes them so
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Let weights change after the last batch."""
        self._scope.end_if_last(trainer)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let weights change, where the last batch was not known."""
        self._scope.end()

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Clean up: ``teardown`` is not called after an exception."""
        if self._first_batch is not None:
            self._first_batch.cancel()
            self._first_batch = None
        self._clean_up()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fold where asked, and in a worker process, whose state the launcher loads into the plain model at home."""
        self._clean_up()
        if stage == "fit" and self.fold_on_fit_end:
            fold(self._select(pl_module).layers)
        elif stage == "fit" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            # only what was rewritten here is plain at home; the rest goes there as g and v, which is exact
            fold(NamedLayer((name,), pl_module.get_submodule(name)) for name in self._rewritten)
            for name in self._centered:
                fold_mean(pl_module.get_submodule(name))
            save_as_weights(pl_module.modules(), False)
        self._rewritten, self._centered = [], []

    def _clean_up(self) -> None:
        self._scope.end()
        self._resume.forget()
        for handle in self._load_hooks:
            handle.remove()
        self._load_hooks = []

    def _add_means(self, trainer: pl.Trainer, selection: Selection) -> None:
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            where = f"come home from the processes of {type(trainer.strategy).__name__}"
            require_biases(selection.layers, where, 'use `strategy="ddp"`')
        elif self.checkpoint == "folded":
            require_biases(selection.layers, "be saved", 'pass `checkpoint="parametrized"`')
        require_averaged_means(trainer)
        self._centered = attach(
            selection.layers, momentum=self.mean_only_momentum, synchronize=self.mean_only_synchronize
        )

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
                f"{some(late)} would train without weight normalization, because {name} "
                "rewrites the model before `LightningModule.setup` and later hooks run: build layers in "
                "`__init__` or `configure_model`, or end `LightningModule.setup` with "
                "`apply_weight_norm(self)`, or exclude them."
            )
        if self.mean_only_batch_norm:
            require_mean_only(selection.layers)
        require_in_optimizers(trainer.optimizers, selection.layers)


def _plain(selection: Selection) -> list[NamedLayer]:
    return [layer for layer in selection.layers if plain_tensors(layer.module)]


def _configure_model(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Build the layers of ``configure_model`` now, in the contexts in which the Trainer calls it later."""
    if is_overridden("configure_model", pl_module):
        with (
            trainer.strategy.tensor_init_context(),
            trainer.strategy.model_sharded_context(),
            trainer.precision_plugin.module_init_context(),
        ):
            pl_module.configure_model()
