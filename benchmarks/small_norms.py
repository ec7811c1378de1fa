"""One small norm a step or one for each of K micro-batches: what does a pass over the gradients buy?

On scikit-learn's digits (MLP 64-32-10), fresh and after 300 steps of SGD: the variance of one step's estimates of
|G|² and tr(Σ) with all K small norms (K + 1 passes over the gradients) and with the first only (2 passes), and the
ratio of what they cost for the same accuracy, passes times variance. Run it with ``python benchmarks/small_norms.py``.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def per_example_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    found = vmap(grad(loss), (None, 0, 0))(dict(model.named_parameters()), x, y)
    return torch.cat([g.detach().flatten(1) for g in found.values()], dim=1)


def variances(gradients: Tensor, size: int, count: int, windows: int = 3000) -> tuple[list[float], list[float]]:
    pairs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(windows):
        order = torch.randint(len(gradients), (count, size))
        samples = gradients[order].mean(1)
        norms, mean = samples.square().sum(1), float(samples.mean(0).square().sum())
        for every, small in ((True, float(norms.mean())), (False, float(norms[0]))):
            # the mean norms are |G|² + tr(Σ) / size and |G|² + tr(Σ) / (size * count)
            noise = (small - mean) / (1 - 1 / count)
            pairs[every].append((small - noise, size * noise))
    every, first = (torch.tensor(pairs[kind], dtype=torch.float64).var(0).tolist() for kind in (True, False))
    return every, first


def main() -> None:
    torch.manual_seed(0)
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x / 16
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    print("weights      b   K   variance, first only / all K      cost for the same accuracy, first only / all K")
    for name, steps in (("fresh", 0), ("300 steps", 300)):
        for _ in range(steps):
            batch = torch.randint(len(x), (32,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        gradients = per_example_gradients(model, x, y)
        for size in (8, 32):
            for count in (2, 4, 8):
                every, first = variances(gradients, size, count)
                ratios = [b / a for a, b in zip(every, first, strict=True)]
                cost = [2 / (count + 1) * ratio for ratio in ratios]
                print(
                    f"{name:10} {size:3} {count:3}   |G|² {ratios[0]:4.1f}   tr(Σ) {ratios[1]:5.1f}       "
                    f"       |G|² {cost[0]:4.1f}   tr(Σ) {cost[1]:5.1f}"
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
