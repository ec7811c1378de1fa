"""What the noise scale's statistics do with gradients whose truth is known: ``python benchmarks/made_up_gradients.py``.

Two tables of docs/statistics.md: the bias that is left where long sequences have other gradients than short ones, and
how often the 95 % interval covers under heavy tails. About five minutes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_wn import GradientNoiseScale

DIMENSION = 40


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def sequences(cv: float, share: float, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Log-normal lengths n, and mean gradients of sequences with a topic of this share; long ones of another kind.

    The mean gradient moves by its own length over two standard deviations of ln n, mostly along itself.
    """
    spread = math.sqrt(math.log(1.0 + cv * cv))
    z = normal(count)
    sizes = (z * spread + math.log(40.0) - spread * spread / 2).exp().round().clamp(min=1.0)
    mean = torch.full((DIMENSION,), 0.5 / math.sqrt(DIMENSION), dtype=torch.float64)
    aside = normal(DIMENSION)
    way = 0.8 * mean + 0.6 * 0.5 * aside / aside.norm()
    topic = math.sqrt(8.0 * share / DIMENSION) * normal(count, DIMENSION)
    own = math.sqrt(8.0 * (1.0 - share) / DIMENSION) * normal(count, DIMENSION) / sizes.sqrt()[:, None]
    return sizes, mean + topic + own + z.tanh()[:, None] * way


def bias(cv: float, share: float, samples: int) -> tuple[float, float]:
    """Return |G|² and n V, measured over true, of many steps whose samples weigh as much as they are long."""
    sizes, gradients = sequences(cv, share)
    mean = (sizes[:, None] * gradients).sum(0) / sizes.sum()
    metric = GradientNoiseScale(unit="tokens", ema_decay=1.0)
    steps = 8000 if samples < 64 else 4000
    n_v = 0.0
    for _ in range(steps // 2000):
        drawn = torch.randint(len(sizes), (2000, samples))
        n, g = sizes[drawn], gradients[drawn]
        optimizers = (n[..., None] * g).sum(1) / n.sum(1, keepdim=True)
        n_v += float(n.sum(1).mean() * (optimizers - mean).square().sum(1).mean()) / (steps // 2000)
        for step in zip(g.square().sum(2), n, optimizers.square().sum(1), n, strict=True):
            metric.update(*step)
    estimate = metric.estimate()
    return estimate.grad_sq_norm / float(mean @ mean), estimate.cov_trace / n_v


def lengths_of_gradients(kind: str, *shape: int) -> Tensor:
    """What examples' noise is multiplied with, of mean square 1."""
    if kind == "normal":
        return torch.ones(*shape, dtype=torch.float64)
    if kind == "t(3)":
        chi = torch.distributions.Chi2(torch.tensor(3.0, dtype=torch.float64)).sample(shape)
        return chi.rsqrt()
    if kind == "log-normal":
        return (normal(*shape) - 1.0).exp()
    return torch.where(torch.rand(*shape, dtype=torch.float64) < 0.02, 6.0, math.sqrt(0.28 / 0.98))


def coverage(kind: str, samples: int, size: int, count: int, runs: int) -> tuple[float, float]:
    """Return how often the interval covers, and how often it ends below the truth: |G|² = 1, tr(Σ) = 40."""
    covered = below = 0
    for _ in range(runs):
        noise = normal(count, samples * size, DIMENSION) * lengths_of_gradients(kind, count, samples * size, 1)
        noise[..., 0] += 1.0
        g = noise.reshape(count, samples, size, DIMENSION).mean(2)
        metric = GradientNoiseScale(ema_decay=1.0)
        for small, big in zip(g.square().sum(2), g.mean(1).square().sum(1), strict=True):
            metric.update(small, [size] * samples, big)
        estimate = metric.estimate()
        covered += estimate.lower <= 40.0 <= estimate.upper
        below += estimate.upper < 40.0
    return covered / runs, below / runs


def main() -> None:
    torch.manual_seed(0)
    print("| cv of lengths | shared | 4 samples | 16 | 64 |\n|---|---|---|---|---|")
    for cv in (0.5, 1.0):
        for share in (0.0, 0.1, 1.0):
            cells = [bias(cv, share, samples) for samples in (4, 16, 64)]
            print(f"| {cv:g} | {share:g} | {' | '.join(f'{a:.2f}, {b:.2f}' for a, b in cells)} |", flush=True)
    print("\n| gradients | 32 x 1, 20 | 32 x 1, 100 | 4 x 32, 20 | 4 x 32, 100 |\n|---|---|---|---|---|")
    for kind in ("normal", "t(3)", "log-normal", "two kinds"):
        designs = ((32, 1, 20), (32, 1, 100), (4, 32, 20), (4, 32, 100))
        cells = [coverage(kind, *design, runs=600 if design[2] == 20 else 200) for design in designs]
        print(f"| {kind} | {' | '.join(f'{a:.1%} ({b:.1%})' for a, b in cells)} |", flush=True)


if __name__ == "__main__":
    main()
