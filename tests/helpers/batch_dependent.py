"""Small frozen models whose examples have no gradients of their own, and the truth about pairs of their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from helpers.frozen_digits import DigitsMLP, digits, loader
from helpers.gan import GAN
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.utils.data import DataLoader, Dataset, TensorDataset


class BatchNormMLP(DigitsMLP):
    """Each example's gradient depends on its whole batch."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr)
        self.net.insert(1, nn.BatchNorm1d(32))


class Contrastive(DigitsMLP):
    """Two noisy views of each digit find each other among all views of the batch (SimCLR, arXiv 2002.05709)."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].repeat(2, 1)
        z = normalize(self(x + 0.3 * torch.randn_like(x)))
        alike = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        count = len(batch[0])
        return cross_entropy(alike, torch.arange(2 * count).roll(count))


class MixedInStep(DigitsMLP):
    """MixUp in the training step: one partner and one share for each batch (arXiv 1710.09412)."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = mixed(*batch)
        return cross_entropy(self(x), y)


class MixedInLoader(DigitsMLP):
    """The same, where the loader mixes."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])


def mixed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mix a batch with itself in another order."""
    share = torch.distributions.Beta(1.0, 1.0).sample()
    order = torch.randperm(len(x))
    y = one_hot(y, 10).to(x)
    return share * x + (1 - share) * x[order], share * y + (1 - share) * y[order]


class NodeLoss(DigitsMLP):
    """Messages pass within the graphs of a batch, and the loss is a mean over all nodes of all of them."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        hidden = self.net[1](self.net[0](batch["adjacency"] @ batch["x"]))
        return cross_entropy(self.net[2](batch["adjacency"] @ hidden), batch["y"])


class Graphs(Dataset):
    """Graphs of 3 to 12 nodes that share a topic, with a label at each node."""

    def __init__(self, count: int = 600) -> None:
        generator = torch.Generator().manual_seed(0)
        self.graphs = []
        for _ in range(count):
            nodes = int(torch.randint(3, 13, (), generator=generator))
            topic = torch.randn(8, generator=generator)
            x = topic + torch.randn(nodes, 8, generator=generator)
            edges = (torch.rand(nodes, nodes, generator=generator) < 0.4).float() + torch.eye(nodes)
            y = (2 * (x[:, 0] > 0) + (x[:, 1] > 0)).long()
            self.graphs.append((x, edges / edges.sum(1, keepdim=True), y))

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.graphs[index]


def as_one_graph(graphs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
    """Put graphs side by side, without edges between them."""
    x, edges, y = zip(*graphs, strict=True)
    return {"x": torch.cat(x), "adjacency": torch.block_diag(*edges), "y": torch.cat(y), "num_graphs": len(graphs)}


def collate_mixed(examples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collate and mix."""
    return mixed(*torch.utils.data.default_collate(examples))


def shuffled(data: Dataset, batch_size: int, seed: int, collate: Callable[[Any], Any] | None = None) -> DataLoader:
    """Batches in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=generator, collate_fn=collate)


def gan_digits() -> TensorDataset:
    """Noise and real points of two clusters."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.randint(2, (600, 1), generator=generator) * 2.0 - 1
    return TensorDataset(
        torch.randn(600, 4, generator=generator), sides + 0.3 * torch.randn(600, 6, generator=generator)
    )


def step_loss(model: L.LightningModule, batch: Any) -> Tensor:
    """The loss of automatic optimization."""
    return model.training_step(batch, 0)


def generator_loss(model: GAN, batch: Sequence[Tensor]) -> Tensor:
    return model.generator_loss(*batch)


def discriminator_loss(model: GAN, batch: Sequence[Tensor]) -> Tensor:
    return model.discriminator_loss(*batch)


def parameters_of(name: str) -> Callable[[nn.Module], list[nn.Parameter]]:
    return lambda model: list(getattr(model, name).parameters())


CASES: dict[str, tuple[Callable[[], L.LightningModule], Callable[[int], DataLoader], int]] = {
    "batch norm": (BatchNormMLP, lambda seed: loader(digits(), 32, seed=seed), 32),
    "contrastive": (Contrastive, lambda seed: loader(digits(), 16, seed=seed), 16),
    "graphs": (NodeLoss, lambda seed: shuffled(Graphs(), 8, seed, as_one_graph), 8),
    "mixup in the step": (MixedInStep, lambda seed: loader(digits(), 32, seed=seed), 32),
    "mixup in the loader": (MixedInLoader, lambda seed: shuffled(digits(), 32, seed, collate_mixed), 32),
    "gan": (lambda: GAN(toggle=True), lambda seed: shuffled(gan_digits(), 8, seed), 8),
}
"""Model, loader by its seed, and examples in a batch."""


def pairs_by_brute_force(
    model: L.LightningModule,
    batches: Callable[[int], DataLoader],
    batch_size: int,
    *,
    epochs: int,
    loss: Callable[[Any, Any], Tensor] = step_loss,
    parameters: Callable[[nn.Module], list[nn.Parameter]] = lambda model: list(model.parameters()),
) -> Tensor:
    """g·g' and n (|g|² + |g'|² - 2 g·g')/2 of pairs of batches of the same epoch, which have |G|² and n V as means.

    Returns:
        Mean, its standard error, and the standard deviation of one pair, shape (3, 2).
    """
    by_epoch, single = [], []
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        for epoch in range(epochs):
            rows = []
            for batch in batches(1000 + epoch):
                grads = torch.autograd.grad(loss(model, batch), parameters(model))
                rows.append(torch.cat([g.flatten() for g in grads]).double())
            gradients = torch.stack(rows)
            count = len(gradients)
            squares = gradients.square().sum(1)
            dot = (gradients.sum(0).square().sum() - squares.sum()) / (count * (count - 1))
            by_epoch.append([float(dot), batch_size * float(squares.mean() - dot)])
            for one, other in zip(gradients[::2], gradients[1::2], strict=False):
                single.append([float(one @ other), batch_size * float((one - other).square().sum()) / 2])
    means, pairs = torch.tensor(by_epoch), torch.tensor(single)
    return torch.stack((means.mean(0), means.std(0) / epochs**0.5, pairs.std(0)))
