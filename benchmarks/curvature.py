"""B_simple and B_noise as a small network learns, at the weights that training reaches.

An MLP 64-64-10 on scikit-learn's digits, SGD at 0.4, batch size 32. Run it with ``python benchmarks/curvature.py``
where lightning_wn is installed.
"""

from __future__ import annotations

import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn import measure_noise_scale


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    wanted = [1.28, 0.59, 0.39, 0.27]
    print("loss    B_simple                 B_noise")
    while wanted:
        for batch in DataLoader(data, 32, shuffle=True):
            with torch.no_grad():
                loss = float(loss_of(model, list(data.tensors)))
            if loss <= wanted[0]:
                wanted.pop(0)
                loader = DataLoader(data, 32, shuffle=True)
                simple = measure_noise_scale(model, loader, loss_of, relative_error=0.05, max_batches=4000)
                noise = measure_noise_scale(
                    model, loader, loss_of, curvature=True, relative_error=0.05, max_batches=8000
                )
                cells = [f"{e.noise_scale:5.1f} ({e.lower:5.1f} to {e.upper:5.1f})" for e in (simple, noise)]
                print(f"{loss:.2f}    {'   '.join(cells)}", flush=True)
                if not wanted:
                    return
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
