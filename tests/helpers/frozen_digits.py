"""A small frozen network on real digits, whose |G|² and tr(Σ) are known by brute force."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def digits(count: int | None = None, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """The first ``count`` of the 1,797 digits, pixels in [0, 1]."""
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:count] / 16, dtype=dtype), torch.tensor(y[:count]))


def loader(data: TensorDataset, batch_size: int = 32, *, drop_last: bool = True, seed: int = 0) -> DataLoader:
    """Shuffled batches from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=True, drop_last=drop_last, generator=generator)


def in_order(data: Dataset, ranks: int) -> DataLoader:
    """Batches of 16 of this rank's examples r, r + ranks, ..., in the order of the data."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return DataLoader(data, 16, sampler=DistributedSampler(data, ranks, rank, shuffle=False))


def first_length(batch: Sequence[Tensor]) -> int:
    """A batch size function that a command line can name."""
    return len(batch[0])


class DigitsMLP(L.LightningModule):
    """MLP 64-32-10; with learning rate 0 its gradients' moments stay what they are."""

    def __init__(self, lr: float = 0.0, optimizer: str = "SGD", seed: int = 0) -> None:
        super().__init__()
        self.lr = lr
        self.optimizer = optimizer
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=self.lr)


def per_example_gradients(model: DigitsMLP, data: TensorDataset) -> Tensor:
    """Every example's gradient, flattened: shape (examples, parameters), float64."""
    x, y = data.tensors
    parameters = {name: p.detach().double() for name, p in model.net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model.net, parameters, (x[None],)), y[None])

    gradients = vmap(grad(loss), (None, 0, 0))(parameters, x.double(), y)
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def truth(gradients: Tensor) -> tuple[float, float]:
    """|G|² and tr(Σ) that samples drawn without replacement from N examples estimate without bias.

    With S² the trace of the covariance with N - 1 below, E|g_n|² = |G_N|² + S² (1/n - 1/N).
    """
    count = len(gradients)
    mean = gradients.mean(0)
    cov_trace = float((gradients - mean).square().sum() / (count - 1))
    return float(mean @ mean) - cov_trace / count, cov_trace


def standard_errors(
    gradients: Tensor, windows: Sequence[Sequence[int]], measurements: int, *, repeats: int = 20
) -> tuple[float, float]:
    """Standard errors of the mean |G|² and tr(Σ) over ``measurements``, by simulating the design.

    Args:
        gradients: Per-example gradients.
        windows: Sizes of the samples of each window of an epoch; an epoch draws without replacement.
        measurements: How many windows are averaged.
        repeats: Epochs' worth of windows simulated, at least 200 windows in all.
    """
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for _ in range(max(repeats, 200 // len(windows))):
        order = torch.randperm(len(gradients), generator=generator)
        start = 0
        epoch = []
        for sizes in windows:
            samples = []
            for size in sizes:
                samples.append(gradients[order[start : start + size]].mean(0))
                start += size
            epoch.append(textbook_pair(torch.stack(samples), sizes))
        pairs.append(torch.tensor(epoch).mean(0))
    # windows of one epoch are dependent, so the epoch's mean is the unit
    spread = torch.stack(pairs).std(0) * (len(windows) / measurements) ** 0.5
    return float(spread[0]), float(spread[1])


def assert_true(result: Mapping[str, Any], samples: Sequence[int], measurements: int = 400) -> None:
    """Within three standard errors of a design whose own are below 3 %.

    Args:
        result: An estimate of the frozen network.
        samples: Sizes of the samples of each window.
        measurements: How many windows are averaged.
    """
    gradients = per_example_gradients(DigitsMLP(), digits())
    expected = truth(gradients)
    spread = standard_errors(gradients, [samples] * (1797 // sum(samples)), measurements)
    assert result["num_measurements"] == measurements
    assert abs(result["grad_sq_norm"] - expected[0]) < 3 * spread[0] < 3 * 0.03 * expected[0]
    assert abs(result["cov_trace"] - expected[1]) < 3 * spread[1] < 3 * 0.03 * expected[1]


def textbook_pair(samples: Tensor, sizes: Sequence[int]) -> tuple[float, float]:
    """|G|² and tr(Σ) from equally weighted samples, by solving the 2x2 system with a linear solver."""
    count = len(sizes)
    inverse = torch.tensor([1.0 / n for n in sizes], dtype=torch.float64)
    system = torch.tensor([[1.0, float(inverse.mean())], [1.0, float(inverse.sum()) / count**2]], dtype=torch.float64)
    norms = torch.stack((samples.square().sum(1).mean(), samples.mean(0).square().sum())).double()
    solution = torch.linalg.solve(system, norms)
    return float(solution[0]), float(solution[1])
