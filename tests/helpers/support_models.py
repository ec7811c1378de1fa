"""Small models, data and callbacks for the rows of docs/support.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import IterableDataset, TensorDataset

from lightning_wn import apply_weight_norm

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


def lengthen(model: Net) -> None:
    """Make every v of a weight-normalized model longer; at first g's and v's norms add up to the weight's own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight.original1"):
                parameter.mul_(3.0)


class Lengthen(L.Callback):
    """The same after ``WeightNormCallback`` has rewritten the model."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        lengthen(pl_module)


class Reparametrized(Net):
    """Weight-normalized before it is sharded."""

    def configure_model(self) -> None:
        if apply_weight_norm(self):
            lengthen(self)
        super().configure_model()


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
