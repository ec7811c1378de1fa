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
from frozen_digits import QUIET
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_wn import GradientNoiseScaleCallback, WeightNormCallback, apply_weight_norm

ONE_DEVICE = ("micro_batch", "per_example", "consecutive")
TWO_RANKS = ("ddp", "sharded")
COLUMNS = ("micro_batch", "ddp", "per_example", "consecutive", "sharded")
"""The columns of the table, in order; ``ddp`` is the probe ``micro_batch`` under DDP."""

EXAMPLES = 48
CLASSES = 3
WIDTH = 6


# ---------------------------------------------------------------- models and data


class Net(L.LightningModule):
    """A small classifier, frozen by a learning rate of zero."""

    shards = False

    def __init__(self, optimizer: str = "SGD", **arguments: Any) -> None:
        super().__init__()
        self.optimizer, self.arguments = optimizer, {"lr": 0.0} | arguments
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.build()

    def build(self) -> None:
        self.body = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def sharded_parts(self) -> list[nn.Module]:
        return [*[m for m in self.body.children() if next(m.parameters(), None) is not None], self.body]

    def configure_model(self) -> None:
        if not self.shards:
            return
        for module in self.sharded_parts():
            if not isinstance(module, FSDPModule):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return getattr(torch.optim, self.optimizer)(trainable, **self.arguments)


class ByHand(Net):
    """Manual optimization, with a step every ``accumulate`` batches."""

    accumulate = 1

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


class TwoNets(ByHand):
    """Two networks with an optimizer each."""

    def build(self) -> None:
        super().build()
        self.other = nn.Linear(WIDTH, CLASSES)

    def sharded_parts(self) -> list[nn.Module]:
        return [*super().sharded_parts(), self.other]

    def losses(self, batch: Sequence[Tensor]) -> list[Tensor]:
        return [self.loss(batch), nn.functional.cross_entropy(self.other(batch[0]), batch[1])]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            self.manual_backward(self.losses(batch)[index] / self.accumulate)
            if (batch_idx + 1) % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.0) for net in (self.body, self.other)]


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class Normalized(Net):
    norm: type[nn.Module] = nn.BatchNorm1d

    def build(self) -> None:
        super().build()
        self.body.insert(1, self.norm(8))


class OwnSyncBatchNorm(Normalized):
    norm = nn.SyncBatchNorm


class Tied(Net):
    """A weight that two layers share."""

    def build(self) -> None:
        self.body = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        )
        self.body[4].weight = self.body[2].weight

    def sharded_parts(self) -> list[nn.Module]:
        return [self.body]  # FSDP2 wants both users of a parameter in one group


class Twice(Net):
    def build(self) -> None:
        self.body = nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        first, middle, last = self.body
        return last(torch.tanh(middle(torch.tanh(middle(torch.tanh(first(x)))))))

    def sharded_parts(self) -> list[nn.Module]:
        return [self]  # forward calls the layers, not `body`


class Deep(Net):
    def build(self) -> None:
        layers = [nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
        self.body = nn.Sequential(*layers, nn.Linear(8, CLASSES))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Frozen(Net):
    def build(self) -> None:
        super().build()
        self.body[0].requires_grad_(False)


class Tokens(Net):
    """Three tokens an example, of which some are masked; the loss is a mean over the others."""

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        x, y, mask = batch
        losses = nn.functional.cross_entropy(self(x).flatten(0, 1), y.flatten(), reduction="none")
        return (losses * mask.flatten()).sum() / mask.sum()


class Words(Net):
    """An embedding of what a linear layer would read."""

    sparse = False

    def build(self) -> None:
        super().build()
        self.body.insert(0, nn.Embedding(5, WIDTH, sparse=self.sparse))

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x[:, 0].abs() * 4).long().clamp(max=4))


class SparseWords(Words):
    sparse = True


class Sometimes(Net):
    """A layer that only rank 0 uses, without an effect."""

    def build(self) -> None:
        super().build()
        self.extra = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x)
        return logits + 0.0 * self.extra(x) if self.global_rank == 0 else logits


class Uneven(Net):
    """Rank 1 has batches of half the size."""

    def on_before_batch_transfer(self, batch: Sequence[Tensor], dataloader_idx: int) -> Sequence[Tensor]:
        return [t[: len(t) // 2] for t in batch] if self.global_rank == 1 else batch


def examples(count: int = EXAMPLES, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Inputs and labels; two thirds of the labels are one class, so that the mean gradient stands out."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(3 * CLASSES, (count,), generator=generator).sub(2 * CLASSES).clamp(min=0)
    return TensorDataset(x, y)


def token_examples(count: int = EXAMPLES) -> TensorDataset:
    x, y = examples(3 * count).tensors
    lengths = torch.arange(count) % 3 + 1
    mask = (torch.arange(3) < lengths[:, None]).float()
    return TensorDataset(x.unflatten(0, (count, 3)), y.unflatten(0, (count, 3)), mask)


def count_tokens(batch: Sequence[Tensor]) -> Tensor:
    """Unmasked tokens of each example."""
    return batch[2].sum(1)


class Stream(IterableDataset):
    """Without a length; each rank has its own examples."""

    def __init__(self, data: TensorDataset, ranks: int) -> None:
        self.data, self.ranks = data, ranks

    def __iter__(self) -> Iterator[Any]:
        rank = torch.distributed.get_rank() if self.ranks > 1 else 0
        return iter([self.data[i] for i in range(rank, len(self.data), self.ranks)])


# ---------------------------------------------------------------- callbacks of the rows


class Unfreeze(L.Callback):
    """A small parameter between the others joins in the second epoch."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.body[4].bias.requires_grad_(False)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.body[4].bias.requires_grad_(trainer.current_epoch == 1)


class CommunicationHook(L.Callback):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, allreduce_hook)


class OwnReduceScatter:
    """The user's own, set on FSDP2's modules."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        return torch.distributed.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)


class OwnReduction(Net):
    def configure_model(self) -> None:
        super().configure_model()
        self.body[0].set_custom_reduce_scatter(OwnReduceScatter())


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
            pairs, single = [], 0
            for samples in self._windows(model, loss):
                if len(samples) < 2:
                    single += 1
                else:
                    pairs.append(solve(samples))
            mean = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
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
        if self.column != "consecutive":
            for epoch, window in steps:
                parts = [[i] for batch in window for i in batch] if self.column == "per_example" else window
                yield [self._sample(model, loss, epoch, part, window) for part in parts]
            return
        for (epoch, first), (next_epoch, second) in pairwise(steps):
            if epoch == next_epoch:
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
    run.fix = "use `probe='consecutive'`"
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
    run.fix = "choose probe='consecutive'. `Trainer(accumulate_grad_batches=2)` or more measures any model exactly"


@row("`sync_batchnorm=True`")
def _(run: Run) -> None:
    run.model = Normalized
    run.settings = {"sync_batchnorm": True}
    run.fix = "use `Trainer(sync_batchnorm=False)`" if run.column == "ddp" else "choose probe='consecutive'"


@row("`nn.SyncBatchNorm` in the model", never=["micro_batch", "consecutive"])
def _(run: Run) -> None:
    run.model = OwnSyncBatchNorm
    run.fix = "use `Trainer(sync_batchnorm=False)` with BatchNorm"
    if run.column == "per_example":
        run.fix = "choose probe='consecutive'"


@row("activation checkpointing")
def _(run: Run) -> None:
    run.model = Checkpointed


@row("`torch.compile`")
def _(run: Run) -> None:
    run.fix = "measure without torch.compile, or choose another probe. `Trainer(accumulate_grad_batches=2)`"
    run.prepare = lambda model: model.body.compile(backend="aot_eager")


@row("`WeightNormCallback`")
def _(run: Run) -> None:
    run.callbacks = [WeightNormCallback()]
    run.reference = apply_weight_norm
    run.fix = "exclude the layer"


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
    run.limit = {"micro_batch": 4, "consecutive": 4}.get(run.column, 2)


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
