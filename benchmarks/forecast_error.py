"""How far a forecast of the noise scale is off: fitted on the first half of a run, scored on the second.

Twelve short runs on handwritten digits and on the characters of the standard library's source. Beside the forecast
stand its two parts alone, the power law and "it stays what it was last". Run it with
``python benchmarks/forecast_error.py`` where lightning_wn and ``[examples]`` are installed; it takes minutes.
"""

from __future__ import annotations

import logging
import math
import statistics
import sysconfig
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.batch_size.forecast import LossPoint, NoiseScaleForecast, fit_forecast
from lightning_wn.batch_size.history import history_of, read_scalars
from lightning_wn.batch_size.loss_points import loss_points

_CONTEXT = 8
# network, optimizer, learning rate, micro-batch of which a step has four, optimizer steps
_RUNS = (
    ("linear", "SGD", 0.1, 8, 1200),
    ("mlp", "SGD", 0.03, 8, 1500),
    ("mlp", "SGD", 0.1, 8, 1200),
    ("mlp", "SGD", 0.3, 32, 900),
    ("mlp", "Adam", 1e-3, 8, 1200),
    ("deep", "SGD", 0.1, 8, 1200),
    ("cnn", "SGD", 0.05, 8, 900),
    ("cnn", "Adam", 1e-3, 8, 900),
    ("characters", "SGD", 0.2, 16, 2500),
    ("characters", "SGD", 0.3, 16, 2500),
    ("characters", "Adam", 1e-3, 16, 2500),
    ("characters", "Adam", 3e-3, 32, 2000),
)


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: str, lr: float) -> None:
        super().__init__()
        self.net, self.optimizer, self.lr = net, optimizer, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=self.lr)


def digits() -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))


def characters() -> TensorDataset:
    """60,000 places in the source of the standard library, each the eight characters before it and its own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))[:40]
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)[:300_000]
    codes = torch.tensor([min(ord(character), 127) for character in text])
    starts = torch.randint(len(codes) - _CONTEXT, (60_000,), generator=torch.Generator().manual_seed(0))
    return TensorDataset(torch.stack([codes[starts + i] for i in range(_CONTEXT)], 1), codes[starts + _CONTEXT])


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "linear":
        return nn.Linear(64, 10)
    if name == "mlp":
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if name == "deep":
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    if name == "cnn":
        first = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*first, nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    hidden = [nn.Linear(16 * _CONTEXT, 128), nn.ReLU(), nn.Linear(128, 128)]
    return nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), *hidden)


def record(run: tuple[str, str, float, int, int], folder: str) -> list[LossPoint]:
    """Train, and return what the logger's files tell of it."""
    name, optimizer, lr, micro_batch, steps = run
    data = characters() if name == "characters" else digits()
    logger = CSVLogger(folder, name="run")
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=4,
        log_every_n_steps=5,
        callbacks=[GradientNoiseScaleCallback(every_n_steps=1)],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(1)
    trainer.fit(Classifier(network(name), optimizer, lr), DataLoader(data, micro_batch, shuffle=True, drop_last=True))
    scalars = read_scalars(logger.log_dir)
    return loss_points(history_of(scalars, "gns", logger.log_dir), *scalars["train_loss"])


def error(forecast: NoiseScaleForecast, rest: Sequence[LossPoint]) -> float:
    """Root mean square error of the logarithm."""
    off = [math.log(forecast.at(point.loss).noise_scale / point.noise_scale) for point in rest]
    return math.sqrt(statistics.fmean(x * x for x in off))


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    errors: dict[str, list[float]] = {"forecast": [], "power law": [], "stays": []}
    inside = []
    print(f"{'run':<28} {'forecast':>9} {'power law':>9} {'stays':>9}   exponent  weight")
    for run in _RUNS:
        with tempfile.TemporaryDirectory() as folder:
            points = record(run, folder)
        half = math.ceil(len(points) / 2)
        try:
            both = fit_forecast(points[:half])
        except ValueError as reason:
            print(f"{' '.join(map(str, run)):<28} {reason}")
            continue
        parts = (both, replace(both, weight=1.0), replace(both, weight=0.0))
        for name, forecast in zip(errors, parts, strict=True):
            errors[name].append(error(forecast, points[half:]))
        ahead = [(both.at(point.loss), point.noise_scale) for point in points[half:]]
        inside.append(statistics.fmean(a.lower <= value <= a.upper for a, value in ahead))
        shown = "".join(f"{math.exp(values[-1]):9.2f}x" for values in errors.values())
        print(f"{' '.join(map(str, run)):<28}{shown}  {both.exponent:9.2f}  {both.weight:6.2f}", flush=True)
    for name, values in errors.items():
        mean, median = math.exp(statistics.fmean(values)), math.exp(statistics.median(values))
        print(f"{name}: off by {mean:.2f}x in the geometric mean over runs, {median:.2f}x in the median")
    print(f"in the 95 % interval: {statistics.fmean(inside):.0%}")


if __name__ == "__main__":
    main()
