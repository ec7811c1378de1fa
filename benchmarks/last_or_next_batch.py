"""Which second batch at the same weights is a fair one: a fresh one, the next one, or the last one.

The product of two batches' gradients has the mean |G|² only if neither has shaped the weights. Training by hand on
digits, at each step from the 50th to the 300th; the median noise scale of eight seeds. A fresh batch is drawn from all
examples, those of the present batch included, which adds tr(Σ) over their number to |G|². Run it with
``python benchmarks/last_or_next_batch.py`` where scikit-learn is installed.
"""

from __future__ import annotations

import statistics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

BATCH, FIRST, LAST, SEEDS = 32, 50, 300, 8
NAMES = ("fresh", "next", "last", "last, as it was")


def noise_scales(optimizer: str, lr: float, seed: int, *, batch_norm: bool) -> list[float]:
    """Return n V / |G|² by each kind of second batch, in the order of NAMES."""
    torch.manual_seed(seed)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    norm = [nn.BatchNorm1d(64)] if batch_norm else []
    net = nn.Sequential(nn.Linear(64, 64), *norm, nn.ReLU(), nn.Linear(64, 10))
    parameters = list(net.parameters())
    stepper = getattr(torch.optim, optimizer)(parameters, lr=lr)

    def gradient(chosen: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(net(x[chosen]), y[chosen])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    sums = torch.zeros(len(NAMES), 2, dtype=torch.float64)
    waiting: list[Tensor] = []
    last = last_gradient = None
    for step in range(LAST):
        if len(waiting) < 2:
            waiting += [part for part in torch.randperm(len(x)).split(BATCH) if len(part) == BATCH]
        now = waiting.pop(0)
        own = gradient(now)
        if step >= FIRST:
            fresh = torch.randperm(len(x))[:BATCH]
            others = (gradient(fresh), gradient(waiting[0]), gradient(last), last_gradient)
            sums += torch.tensor([[float(own @ g), float((own - g).square().sum()) / 2] for g in others])
        last, last_gradient = now, own
        for parameter, part in zip(parameters, own.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        stepper.step()
    return [BATCH * float(variance / product) if product > 0 else float("inf") for product, variance in sums]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"median noise scale of {SEEDS} seeds{'':9}" + "".join(f"{name:>16}" for name in NAMES))
    for batch_norm in (False, True):
        for optimizer, lr in (("SGD", 0.1), ("SGD", 0.4), ("Adam", 1e-3), ("Adam", 1e-2)):
            runs = [noise_scales(optimizer, lr, seed, batch_norm=batch_norm) for seed in range(SEEDS)]
            name = f"{optimizer} {lr:g}, {'batch norm' if batch_norm else 'no batch norm'}"
            print(
                f"{name:36}" + "".join(f"{statistics.median(of):16.0f}" for of in zip(*runs, strict=True)), flush=True
            )
