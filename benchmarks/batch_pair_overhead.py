"""What the pair of batches costs: a measured step beside a plain one, in the same run under Lightning.

One step in ten is measured; its copy of the model is made at the optimizer's step, and its second batch runs at the
start of the next one. Both belong to it: the time of a measured step is that of both steps less a plain one. Run it
with ``python benchmarks/batch_pair_overhead.py`` where lightning_wn is installed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback

CADENCE = 10


class Block(nn.Module):
    """Two convolutions with batch norm, and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.net(x))


def resnet() -> nn.Module:
    blocks = [Block(32) for _ in range(4)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


def mlp() -> nn.Module:
    hidden = [layer for _ in range(3) for layer in (nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.ReLU())]
    return nn.Sequential(nn.Linear(256, 1024), *hidden, nn.Linear(1024, 10))


class Trained(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(L.Callback):
    """Times each step from the start of its batch to the start of the next one."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.starts = now, []

    def on_train_batch_start(self, *args: object) -> None:
        self.starts.append(self.now())


def ratios(
    net: nn.Module, shape: tuple[int, ...], batch: int, *, repeats: int, now: Callable[[], float]
) -> list[float]:
    """Return what each measured step took over the median of the plain ones."""
    clock, probe = Clock(now), GradientNoiseScaleCallback("batch_pair", every_n_steps=CADENCE)
    steps = CADENCE * (repeats + 2)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[clock, probe],
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    x = torch.randn(shape)
    trainer.fit(Trained(net), DataLoader([(x, index % 10) for index in range(batch * steps)], batch))
    times = [after - before for before, after in zip(clock.starts, clock.starts[1:], strict=False)]
    places = range(CADENCE, len(times) - 1)  # the first steps warm up
    plain = statistics.median(times[i] for i in places if i % CADENCE > 1)
    return [(times[i] + times[i + 1] - plain) / plain for i in places if i % CADENCE == 0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, on a machine that others use, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    now = time.process_time if arguments.cpu_time else time.perf_counter
    print("a measured step over a plain one: median (least to most); and a step at one in 100")
    for name, make, shape, batch in (
        ("batch norm ResNet of 0.1 M, 32 images", resnet, (3, 32, 32), 32),
        ("batch norm MLP of 3.4 M, 128 examples", mlp, (256,), 128),
        ("batch norm MLP of 3.4 M, 32 examples", mlp, (256,), 32),
    ):
        found = ratios(make(), shape, batch, repeats=arguments.repeats, now=now)
        middle = statistics.median(found)
        print(
            f"  {name:40} {middle:.2f}x ({min(found):.2f} to {max(found):.2f})   {1 + (middle - 1) / 100:.3f}x",
            flush=True,
        )
