"""The rows of docs/support.md as small runs, and what each has to give, by autograd in float64.

A row is a function that changes a :class:`Run`; a cell is a row under one probe on one strategy. The learning rate is
zero, so that every gradient can be computed afterwards on a copy of the model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from helpers.frozen_digits import QUIET
from helpers.support_models import (
    ByHand,
    Checkpointed,
    CommunicationHook,
    Deep,
    Frozen,
    Lengthen,
    Net,
    Normalized,
    OwnReduction,
    OwnSyncBatchNorm,
    Reparametrized,
    Sometimes,
    SparseWords,
    Stream,
    Tied,
    Tokens,
    Twice,
    TwoNets,
    Uneven,
    Unfreeze,
    Words,
    count_tokens,
    examples,
    lengthen,
    token_examples,
)
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_wn import GradientNoiseScaleCallback, WeightNormCallback, apply_weight_norm

ONE_DEVICE = ("micro_batch", "per_example", "batch_pair", "consecutive")
TWO_RANKS = ("ddp", "sharded")
COLUMNS = ("micro_batch", "ddp", "per_example", "batch_pair", "consecutive", "sharded")
"""The columns of the table, in order; ``ddp`` is the probe ``micro_batch`` under DDP."""


# ---------------------------------------------------------------- a run


@dataclass
class Run:
    """One cell: how it trains and what it has to give."""

    column: str
    model: type[Net] = Net
    model_arguments: dict[str, Any] = field(default_factory=dict)
    data: TensorDataset = field(default_factory=examples)
    batch_size: int = 8
    accumulate: int = 1
    epochs: int = 1
    limit: int | None = None
    """Batches of each rank in an epoch."""
    stream: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: list[L.Callback] = field(default_factory=list)
    prepare: Callable[[Net], Any] = lambda model: None
    """Changes the model before it is trained."""
    resumes: bool = False
    tokens: bool = False
    launcher: str | None = None
    """A strategy that starts the ranks from the process that calls `fit`."""
    # what to expect
    fix: str = ""
    """What a refusal has to advise."""
    left_out_from: int | None = None
    """The epoch from which steps are left out."""
    losses: int = 1
    reference: Callable[[Net], Any] = lambda model: None
    """Changes the copy that gradients are computed on."""
    chosen: Callable[[str], bool] = lambda name: True
    """Which parameters are measured, by name."""
    trainable: Callable[[int, str], bool] = lambda epoch, name: True
    """Which parameters train in this epoch, by name."""
    skipped: int = 0
    """Optimizer steps at the start whose gradients overflow."""
    groups: dict[str, int] = field(default_factory=dict)
    """Measurements missing of each further estimate, which has to be finite; -1 is some."""

    def __post_init__(self) -> None:
        if self.column == "micro_batch":
            self.accumulate = 2
        if self.column == "per_example":
            self.batch_size = 16

    @property
    def probe(self) -> str:
        return "micro_batch" if self.column == "ddp" else self.column

    @property
    def ranks(self) -> int:
        return 2 if self.column in TWO_RANKS else 1

    @property
    def by_hand(self) -> bool:
        return issubclass(self.model, ByHand)

    # ------------------------------------------------------------ training

    def strategy(self) -> Any:
        if self.launcher is not None:
            return self.launcher
        if self.column == "ddp":
            return DDPStrategy(process_group_backend="gloo", **self.ddp)
        if self.column == "sharded":
            return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        return "auto"

    def loader(self) -> DataLoader:
        if self.stream:
            return DataLoader(Stream(self.data, self.ranks), self.batch_size)
        sampler = None
        if self.ranks > 1:
            rank = int(os.environ.get("LOCAL_RANK", "0"))
            sampler = DistributedSampler(self.data, 2, rank, shuffle=False)
        return DataLoader(self.data, self.batch_size, sampler=sampler)

    def trainer(self, callback: L.Callback, epochs: int) -> L.Trainer:
        settings = QUIET | {"max_epochs": epochs, "devices": self.ranks, "strategy": self.strategy()}
        settings |= {} if self.by_hand else {"accumulate_grad_batches": self.accumulate}
        settings |= {} if self.limit is None else {"limit_train_batches": self.limit}
        callbacks = [*copy.deepcopy(self.callbacks), callback]
        return L.Trainer(callbacks=callbacks, **(settings | self.settings))

    def callback(self) -> GradientNoiseScaleCallback:
        arguments = {"probe": self.probe, "every_n_steps": 1, "ema_decay": 1.0} | self.arguments
        return GradientNoiseScaleCallback(**arguments)

    def fresh_model(self) -> Net:
        model = self.model(**self.model_arguments)
        if self.by_hand:
            model.accumulate = self.accumulate
        return model

    def measure(self, folder: Path) -> dict[str, Any]:
        """Train, and return what JSON can hold."""
        callback, checkpoint_path = self.callback(), None
        trainer = None
        try:
            if self.resumes:
                checkpoint_path = str(folder / f"{self.column}.ckpt")
                model = self._trained_model()
                before = self.callback()
                trainer = self.trainer(before, 1)
                trainer.fit(model, self.loader())
                trainer.save_checkpoint(checkpoint_path)
            trainer = self.trainer(callback, self.epochs)
            trainer.fit(self._trained_model(), self.loader(), ckpt_path=checkpoint_path)
        except Exception as error:
            steps = -1 if trainer is None else trainer.global_step
            return {"error": type(error).__name__, "message": str(error), "steps": steps}
        measured = []
        for index in range(self.losses):
            estimate = callback.estimate(index if self.losses > 1 else None)
            names = ("grad_sq_norm", "cov_trace", "num_measurements", "coverage", "approximate", "probe")
            measured.append({name: getattr(estimate, name) for name in names})
            metric = callback._measurements[index].metric
            measured[-1]["rejected"] = {reason.name: count for reason, count in metric.rejected.items() if count}
        others = {group: callback.estimate(group=group) for group in self.groups}
        return {
            "estimates": measured,
            "others": {name: [e.num_measurements, e.cov_trace] for name, e in others.items()},
        }

    def _trained_model(self) -> Net:
        model = self.fresh_model()
        model.shards = self.column == "sharded"
        self.prepare(model)
        return model

    # ------------------------------------------------------------ what it has to give

    def expected(self) -> list[dict[str, Any]]:
        """For each loss the mean |G|², tr(Σ), their number, and how many windows had a single sample."""
        model = self.fresh_model().double().train()
        self.reference(model)
        found = []
        for loss in range(self.losses):
            windows = list(self._windows(model, loss))
            pairs = [samples for samples in windows if len(samples) > 1]
            single = len(windows) - len(pairs)
            if self.arguments.get("unit", "examples") == "examples":
                mean = torch.tensor([solve(samples) for samples in pairs], dtype=torch.float64).mean(0).tolist()
            else:
                mean = solve_parts(pairs)
            found.append(
                {"grad_sq_norm": mean[0], "cov_trace": mean[1], "num_measurements": len(pairs), "single": single}
            )
        return found

    def coverage(self) -> float:
        """Share of the trainable parameters that is measured."""
        model = self.fresh_model()
        self.reference(model)
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        return sum(size for name, size in sizes.items() if self.chosen(name)) / sum(sizes.values())

    def _windows(self, model: Net, loss: int) -> Iterator[list[Sample]]:
        steps = []
        for epoch in range(self.epochs if self.left_out_from is None else self.left_out_from):
            steps += [(epoch, window) for window in self._windows_of_indices()]
        steps = steps[self.skipped :]
        if self.column not in ("batch_pair", "consecutive"):
            for epoch, window in steps:
                parts = [[i] for batch in window for i in batch] if self.column == "per_example" else window
                yield [self._sample(model, loss, epoch, part, window) for part in parts]
            return
        for (epoch, first), (next_epoch, second) in pairwise(steps):
            if self.column == "batch_pair":
                # the next micro-batch, with the parameters that the step had; a resumed run knows no step before it
                if epoch == next_epoch or not self.resumes:
                    other = self._sample(model, loss, epoch, second[0], second)
                    yield [self._step_sample(model, loss, epoch, first), other]
            elif epoch == next_epoch:
                yield [self._step_sample(model, loss, epoch, window) for window in (first, second)]

    def _windows_of_indices(self) -> list[list[list[int]]]:
        """The examples of each micro-batch of each optimizer step of an epoch, over all ranks."""
        by_rank = []
        for rank in range(self.ranks):
            indices = list(range(rank, len(self.data), self.ranks))
            batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
            if self.model is Uneven and rank == 1:
                batches = [batch[: len(batch) // 2] for batch in batches]
            batches = batches[: self.limit]
            by_rank.append([batches[i : i + self.accumulate] for i in range(0, len(batches), self.accumulate)])
        return [[batch for window in windows for batch in window] for windows in zip(*by_rank, strict=True)]

    def _sample(
        self, model: Net, loss: int, epoch: int, indices: Sequence[int], window: Sequence[Sequence[int]]
    ) -> Sample:
        batch = [t[list(indices)] for t in self.data.tensors]
        batch = [t.double() if t.is_floating_point() else t for t in batch]
        losses = model.losses(batch) if isinstance(model, TwoNets) else [model.loss(batch)]
        names = [n for n, p in model.named_parameters() if self.chosen(n) and self.trainable(epoch, n)]
        parameters = [p for n, p in model.named_parameters() if n in names and p.requires_grad]
        gradients = torch.autograd.grad(losses[loss], parameters, allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradients if g is not None])
        # a batch's loss is a mean over what it counts, and batches of a window weigh alike
        own = next(part for part in window if indices[0] in part)
        return Sample(flat, self._count(indices), self._count(indices) / self._count(own))

    def _step_sample(self, model: Net, loss: int, epoch: int, window: Sequence[Sequence[int]]) -> Sample:
        """One optimizer step's gradient, whose examples are all its batches'."""
        samples = [self._sample(model, loss, epoch, batch, window) for batch in window]
        mean = torch.stack([sample.gradient for sample in samples]).mean(0)
        return Sample(mean, sum(sample.size for sample in samples), 1.0)

    def _count(self, indices: Sequence[int]) -> float:
        return float(self.data.tensors[2][list(indices)].sum()) if self.tokens else float(len(indices))


@dataclass
class Sample:
    gradient: Tensor
    size: float
    weight: float


def solve(samples: Sequence[Sample]) -> list[float]:
    """|G|² and tr(Σ) from E|g_k|² = |G|² + tr(Σ)/n_k and E|ḡ|² = |G|² + tr(Σ) Σ w_k²/n_k, Σ w_k = 1."""
    w = torch.tensor([s.weight for s in samples], dtype=torch.float64)
    n = torch.tensor([s.size for s in samples], dtype=torch.float64)
    g = torch.stack([s.gradient for s in samples])
    w = w / w.sum()
    system = torch.tensor([[1.0, float((w / n).sum())], [1.0, float((w**2 / n).sum())]], dtype=torch.float64)
    norms = torch.stack((w @ g.square().sum(1), (w @ g).square().sum()))
    return torch.linalg.solve(system, norms).tolist()


def solve_parts(windows: Sequence[Sequence[Sample]]) -> list[float]:
    """|G|² and n V where what is counted are parts of examples, of steps that have as many micro-batches each.

    With D = |ḡ|² - Σ w_k²|g_k|² and p = 1 - Σ w_k², |G|² is Σ N² D / Σ N² p where samples weigh as many parts as they
    have, and N is what such steps hold on average, up to each, where they do not. V is the mean of
    Σ w_k²|g_k|² + (1/2 - Σ w_k²) D, less |G|² times that of Σ w_k² + (1/2 - Σ w_k²) p.
    """
    top = bottom = own = rest = counts = 0.0
    for index, samples in enumerate(windows):
        w = torch.tensor([s.weight for s in samples], dtype=torch.float64)
        n = torch.tensor([s.size for s in samples], dtype=torch.float64)
        g = torch.stack([s.gradient for s in samples])
        w = w / w.sum()
        alone, mean = float(w.square() @ g.square().sum(1)), float((w @ g).square().sum())
        d, p = mean - alone, 1.0 - float(w.square().sum())
        count = float(n.sum())
        follows = torch.allclose(w, n / n.sum(), rtol=1e-3)
        weight = (count if follows or not index else counts / index) ** 2
        top, bottom, counts = top + weight * d, bottom + weight * p, counts + count
        correction = 0.5 - (1.0 - p)
        own, rest = own + alone + correction * d, rest + (1.0 - p) + correction * p
    grad_sq_norm = top / bottom
    return [grad_sq_norm, counts * (own - grad_sq_norm * rest) / len(windows) ** 2]


# ---------------------------------------------------------------- the rows


ROWS: dict[str, Callable[[Run], None]] = {}
IMPOSSIBLE: dict[str, tuple[str, ...]] = {}
"""Columns in which a row cannot occur, as the table's footnotes say."""


def row(name: str, *, never: Sequence[str] = ()) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    def add(function: Callable[[Run], None]) -> Callable[[Run], None]:
        ROWS[name], IMPOSSIBLE[name] = function, tuple(never)
        return function

    return add


def cell(name: str, column: str) -> Run:
    """Return the run of one cell."""
    run = Run(column)
    ROWS[name](run)
    return run


@row("32-true")
def _(run: Run) -> None:
    pass


@row("64-true")
def _(run: Run) -> None:
    # ModelParallelStrategy takes it as a plugin only
    run.settings = {"plugins": DoublePrecision()}
    run.data = examples(dtype=torch.float64)


@row("bf16-true")
def _(run: Run) -> None:
    run.settings = {"precision": "bf16-true"}


@row("bf16-mixed")
def _(run: Run) -> None:
    run.settings = {"precision": "bf16-mixed"}


@row("16-mixed with a loss scaler, first step skipped")
def _(run: Run) -> None:
    # the first step overflows, and the next scale does not
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    run.settings = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    run.skipped = 1


@row("gradient clipping")
def _(run: Run) -> None:
    run.settings = {"gradient_clip_val": 1e-3}


@row("gradient accumulation")
def _(run: Run) -> None:
    run.accumulate = 3
    run.batch_size = run.batch_size // 2


@row("short last window")
def _(run: Run) -> None:
    run.accumulate = 2
    run.data = examples(40)
    run.batch_size = {"micro_batch": 4, "ddp": 4, "sharded": 4}.get(run.column, 8)
    if run.column == "micro_batch":
        run.accumulate = 4  # windows of four, four and two batches


@row("ragged last batch")
def _(run: Run) -> None:
    run.data = examples(44)


@row("manual optimization")
def _(run: Run) -> None:
    run.model = ByHand


@row("several optimizers")
def _(run: Run) -> None:
    run.model, run.losses = TwoNets, 2
    run.fix = "use `probe='batch_pair'`"
    run.ddp = {"find_unused_parameters": True}


@row("`groups`")
def _(run: Run) -> None:
    run.arguments = {"groups": {"first": "body.0", "all": "body"}}
    run.groups = {"first": 0, "all": 0}


@row("`layers`")
def _(run: Run) -> None:
    run.arguments = {"layers": "body.2"}
    run.chosen = lambda name: name.startswith("body.2")


@row("`preconditioned`")
def _(run: Run) -> None:
    run.model_arguments = {"optimizer": "Adam"}
    run.arguments = {"preconditioned": True}
    run.fix = "use DDP, or `preconditioned=False`"
    run.groups = {"preconditioned": 1}  # there is no second moment before the first step


@row("`curvature_every_n_steps`")
def _(run: Run) -> None:
    run.arguments = {"curvature_every_n_steps": 1}
    run.fix = "use DDP, or `curvature_every_n_steps=None`"
    run.batch_size = run.batch_size // 2  # a measurement takes five batches
    run.groups = {"curvature": -1}


@row("BatchNorm")
def _(run: Run) -> None:
    run.model = Normalized
    run.fix = "choose probe='batch_pair'. `Trainer(accumulate_grad_batches=2)` or more measures any model exactly"


@row("`sync_batchnorm=True`")
def _(run: Run) -> None:
    run.model = Normalized
    run.settings = {"sync_batchnorm": True}
    run.fix = "use `Trainer(sync_batchnorm=False)`" if run.column == "ddp" else "choose probe='batch_pair'"


@row("`nn.SyncBatchNorm` in the model", never=["micro_batch", "batch_pair", "consecutive"])
def _(run: Run) -> None:
    run.model = OwnSyncBatchNorm
    run.fix = "use `Trainer(sync_batchnorm=False)` with BatchNorm"
    if run.column == "per_example":
        run.fix = "choose probe='batch_pair'"


@row("activation checkpointing")
def _(run: Run) -> None:
    run.model = Checkpointed


@row("`torch.compile`")
def _(run: Run) -> None:
    run.fix = "measure without torch.compile, or choose another probe. `Trainer(accumulate_grad_batches=2)`"
    run.prepare = lambda model: model.body.compile(backend="aot_eager")


@row("`WeightNormCallback`")
def _(run: Run) -> None:
    def reference(model: Net) -> None:
        apply_weight_norm(model)
        lengthen(model)

    run.callbacks = [WeightNormCallback(), Lengthen()]
    run.reference = reference
    run.fix = "exclude the layer"


@row("`apply_weight_norm` in `configure_model`")
def _(run: Run) -> None:
    run.model = Reparametrized
    if run.column == "sharded":
        # a sharded model's checkpoint holds g and v
        run.callbacks = [WeightNormCallback(checkpoint="parametrized")]
    run.reference = lambda model: model.configure_model()


@row("tied weights")
def _(run: Run) -> None:
    run.model = Tied


@row("a layer that is called twice")
def _(run: Run) -> None:
    run.model = Twice


@row("frozen parameters")
def _(run: Run) -> None:
    run.model = Frozen


@row("parameters unfrozen in mid-run")
def _(run: Run) -> None:
    run.model, run.callbacks = Deep, [Unfreeze()]
    run.epochs = 2
    run.left_out_from = 1 if run.column == "ddp" else None
    run.trainable = lambda epoch, name: epoch > 0 or name != "body.4.bias"


@row("embeddings")
def _(run: Run) -> None:
    run.model = Words


@row("embeddings with `sparse=True`")
def _(run: Run) -> None:
    run.model = SparseWords
    run.fix = "build it with `sparse=False`"


@row("iterable dataset")
def _(run: Run) -> None:
    run.stream = True


@row("`limit_train_batches`")
def _(run: Run) -> None:
    run.limit = {"micro_batch": 4, "batch_pair": 4, "consecutive": 4}.get(run.column, 2)


@row("masked tokens, counted by `batch_size_fn`")
def _(run: Run) -> None:
    run.model, run.tokens = Tokens, True
    run.data = token_examples()
    run.arguments = {"batch_size_fn": count_tokens, "unit": "tokens"}


@row("fused optimizer")
def _(run: Run) -> None:
    run.model_arguments = {"optimizer": "AdamW", "fused": True}


@row("uneven ranks", never=ONE_DEVICE)
def _(run: Run) -> None:
    run.model = Uneven


@row("resuming from a checkpoint")
def _(run: Run) -> None:
    run.resumes, run.epochs = True, 2


@row("`find_unused_parameters`", never=[*ONE_DEVICE, "sharded"])
def _(run: Run) -> None:
    run.model = Sometimes
    run.ddp = {"find_unused_parameters": True}
    run.reference = lambda model: model.extra.requires_grad_(False)


@row("`static_graph`", never=[*ONE_DEVICE, "sharded"])
def _(run: Run) -> None:
    run.ddp = {"static_graph": True}


@row("`gradient_as_bucket_view`", never=[*ONE_DEVICE, "sharded"])
def _(run: Run) -> None:
    run.ddp = {"gradient_as_bucket_view": True}


@row("your own communication hook", never=ONE_DEVICE)
def _(run: Run) -> None:
    if run.column == "ddp":
        run.callbacks = [CommunicationHook()]
    else:
        run.model = OwnReduction
        run.fix = "remove one of the two"


@row("`ddp_spawn`, `ddp_fork`, `ddp_notebook`", never=[*ONE_DEVICE, "sharded"])
def _(run: Run) -> None:
    run.launcher, run.stream = "ddp_fork", True  # test_ddp.py runs all three
    run.arguments = {"layers": "body.2"}  # the coverage has to come home, too
    run.chosen = lambda name: name.startswith("body.2")


LAUNCHED = "`ddp_spawn`, `ddp_fork`, `ddp_notebook`"
"""The row that starts processes of its own."""
