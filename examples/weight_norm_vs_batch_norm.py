"""Weight normalization, data-dependent initialization and mean-only batch normalization beside batch normalization.

A deep convolutional network without shortcuts, like the ConvPool-CNN of Salimans & Kingma (arXiv 1602.07868), learns
handwritten digits five ways. Each way gets the learning rate that suits it best on validation images, and is then
trained from several seeds and tested on images that nothing was chosen by. As in the paper's figure 2, the picture
shows training loss and test error over epochs and over seconds. Run it from anywhere; everything it writes goes into
``runs/weight_norm_vs_batch_norm/`` of the current directory::

    python examples/weight_norm_vs_batch_norm.py

It takes about a quarter of an hour on one core. ``--quick`` only shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib as mpl
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn import WeightNormCallback

# the images lie in memory: worker processes would only cost time
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
# Lightning 2.6 calls a function that newer versions of torch deprecate
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
# one core, so that processor time is a fair clock on a busy machine
torch.set_num_threads(1)

OUTPUT = Path("runs/weight_norm_vs_batch_norm")
BATCH_SIZE = 50
LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
CONVOLUTIONS = "network.*.convolution"


@dataclass(frozen=True)
class Way:
    """One way to train the network.

    Attributes:
        label: For the legend and the table.
        color: Of the palette of Okabe & Ito, which colour-blind readers can tell apart.
        line: The style of its line.
        callbacks: Builds the Trainer's callbacks.
        batch_norm: Whether the network has batch normalization.
    """

    label: str
    color: str
    line: str
    callbacks: Callable[[], list[Callback]] = list
    batch_norm: bool = False


def mean_only() -> list[Callback]:
    """Behind the convolutions, where the network of the other way has batch normalization."""
    return [
        WeightNormCallback(CONVOLUTIONS, init="data", mean_only_batch_norm=True),
        WeightNormCallback("network.head", init="data"),
    ]


WAYS = {
    "plain": Way("plain", "#555555", ":"),
    "wn": Way("weight norm", "#56B4E9", "--", lambda: [WeightNormCallback()]),
    "wn_data": Way("weight norm, data init", "#0072B2", "-", lambda: [WeightNormCallback(init="data")]),
    "wn_mean_only": Way("weight norm, data init, mean-only batch norm", "#009E73", "-.", mean_only),
    "batch_norm": Way("batch norm", "#D55E00", "-", batch_norm=True),
}


class Block(nn.Module):
    """A convolution and its activation, with batch normalization in between or without."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, batch_norm: bool) -> None:
        super().__init__()
        padding = kernel_size // 2
        # batch normalization has a bias of its own
        self.convolution = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, bias=not batch_norm)
        self.normalization = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.normalization(self.convolution(x)), 0.1)


class ConvPoolCNN(pl.LightningModule):
    """Three times 3 x 3, pooling, three times 3 x 3, pooling, 3 x 3, two times 1 x 1, average over space, Linear."""

    def __init__(self, learning_rate: float, *, batch_norm: bool) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        sizes = [(1, 24, 3), (24, 24, 3), (24, 24, 3), (24, 48, 3), (48, 48, 3), (48, 48, 3)]
        sizes += [(48, 48, 3), (48, 48, 1), (48, 48, 1)]
        layers: dict[str, nn.Module] = {}
        for i, (inputs, outputs, kernel_size) in enumerate(sizes, start=1):
            layers[f"block{i}"] = Block(inputs, outputs, kernel_size, batch_norm=batch_norm)
            if i in (3, 6):
                layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers["average"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        layers["head"] = nn.Linear(48, 10)
        self.network = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.network.values():
            x = layer(x)
        return x

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam, whose learning rate falls to 0 in the second half, as in the paper."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        epochs = self.trainer.max_epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, 2 - 2 * epoch / epochs))
        return {"optimizer": optimizer, "lr_scheduler": schedule}


@dataclass
class Curve:
    """What one run gave, one number per epoch.

    Attributes:
        seconds: Processor time of training since its start.
        loss: The mean training loss of the epoch.
        error: The test error at its end, in percent.
        validation: The cross-entropy of the validation images.
    """

    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


class Record(Callback):
    """Fills a :class:`Curve`; its own work does not count as training time."""

    def __init__(self, validation: Sequence[Tensor], test: Sequence[Tensor]) -> None:
        self.curve = Curve()
        self.validation, self.test = validation, test
        self.losses: list[Tensor] = []
        self.spent = 0.0
        self.since = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.since = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.spent += time.process_time() - self.since
        self.curve.seconds.append(self.spent)
        self.curve.loss.append(float(torch.stack(self.losses).mean()))
        self.losses = []
        pl_module.eval()
        wrong = pl_module(self.test[0]).argmax(1) != self.test[1]
        self.curve.error.append(100 * float(wrong.float().mean()))
        self.curve.validation.append(
            float(nn.functional.cross_entropy(pl_module(self.validation[0]), self.validation[1]))
        )
        pl_module.train()


def digits() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Images and labels to train on (897), to choose learning rates by (300) and to test on (600)."""
    images, labels = load_digits(return_X_y=True)
    # pixels are 0 to 16
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    rest, test = train_test_split(torch.arange(len(y)), test_size=600, stratify=y, random_state=0)
    train, validation = train_test_split(rest, test_size=300, stratify=y[rest], random_state=0)
    return [x[train], y[train]], [x[validation], y[validation]], [x[test], y[test]]


def run(way: Way, learning_rate: float, seed: int, epochs: int) -> Curve:
    """Train once."""
    pl.seed_everything(seed, verbose=False)
    train, validation, test = digits()
    record = Record(validation, test)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*way.callbacks(), record],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(*train), batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    trainer.fit(ConvPoolCNN(learning_rate, batch_norm=way.batch_norm), loader)
    return record.curve


def tune(way: Way, learning_rates: Sequence[float], seeds: Sequence[int], epochs: int) -> dict[float, float]:
    """The median, over seeds of its own, of the smallest validation loss with each learning rate."""
    return {
        rate: statistics.median(min(run(way, rate, seed, epochs).validation) for seed in seeds)
        for rate in learning_rates
    }


def median_over(curves: Sequence[Curve], name: str) -> list[float]:
    """The median over runs, epoch by epoch."""
    return [statistics.median(values) for values in zip(*(getattr(c, name) for c in curves), strict=True)]


def draw(results: Mapping[str, Any]) -> Any:
    """Training loss and test error, over epochs and over seconds."""
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6), layout="constrained", sharey="row")
    for name, result in results.items():
        way, curves = WAYS[name], [Curve(**c) for c in result["curves"]]
        epochs = range(1, len(curves[0].loss) + 1)
        for (row, key), (column, abscissa) in (
            (r, c)
            for r in enumerate(("loss", "error"))
            for c in enumerate((list(epochs), median_over(curves, "seconds")))
        ):
            axis = axes[row][column]
            style = {"color": way.color, "linestyle": way.line}
            axis.plot(abscissa, median_over(curves, key), linewidth=1.8, label=way.label, **style)
            values = [sorted(v) for v in zip(*(getattr(c, key) for c in curves), strict=True)]
            axis.fill_between(
                abscissa, [v[0] for v in values], [v[-1] for v in values], color=way.color, alpha=0.12, linewidth=0
            )
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(visible=True, color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    for axis, label in zip(axes[:, 0], ("training loss", "test error (%)"), strict=True):
        axis.set_ylabel(label)
    for axis in axes[1]:
        axis.set_ylim(0.6, 100)
        axis.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        axis.minorticks_off()
    for axis, label in zip(axes[1], ("epoch", "seconds of training on one core"), strict=True):
        axis.set_xlabel(label)
    seeds = len(next(iter(results.values()))["curves"])
    axes[0][0].set_title(f"median of {seeds} seeds (band: least to most)", fontsize=10, loc="left")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def table(results: Mapping[str, Any]) -> str:
    """The runs in numbers, as Markdown."""
    lines = [
        "| | learning rate | loss, epoch 1 | loss, epoch 5 | loss, last epoch | test error, epoch 5 | test error, "
        "last 5 epochs | s per epoch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        curves = [Curve(**c) for c in result["curves"]]
        loss, error = median_over(curves, "loss"), median_over(curves, "error")
        late = [statistics.fmean(c.error[-5:]) for c in curves]
        median = statistics.median(late)
        seconds = statistics.median(b - a for c in curves for a, b in zip([0.0, *c.seconds], c.seconds, strict=False))
        fifth = min(5, len(loss)) - 1
        lines.append(
            f"| {WAYS[name].label} | {result['learning_rate']:g} | {loss[0]:.2f} | {loss[fifth]:.3f} | "
            f"{loss[-1]:.2g} | {error[fifth]:.1f} % | {median:.2f} % ({min(late):.2f} to {max(late):.2f}) | "
            f"{seconds:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate, two epochs")
    quick = parser.parse_args().quick
    epochs, tuning_epochs, seeds, tuning_seeds = (2, 1, 1, 1) if quick else (30, 12, 5, 3)
    learning_rates = (0.003,) if quick else LEARNING_RATES
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    mpl.use("Agg")  # works without a display
    results = {}
    for name, way in WAYS.items():
        # seeds that are not used again
        tuned = tune(way, learning_rates, range(100, 100 + tuning_seeds), tuning_epochs)
        best = min(tuned, key=lambda rate: tuned[rate])
        print(f"{way.label}: validation loss by learning rate {json.dumps(tuned)}; taken: {best:g}", flush=True)
        curves = [asdict(run(way, best, seed, epochs)) for seed in range(seeds)]
        results[name] = {"learning_rate": best, "tuned": tuned, "curves": curves}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "results.json").write_text(json.dumps(results))
    draw(results).savefig(OUTPUT / "curves.png", dpi=110)
    print(f"\n{table(results)}\n\nPicture: {OUTPUT / 'curves.png'}")


if __name__ == "__main__":
    main()
