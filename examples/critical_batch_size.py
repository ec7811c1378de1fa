"""Does the noise scale predict the critical batch size? Twelve small tasks, each measured.

{scikit-learn's digits, 5,000 images of MNIST} x {linear, MLP, CNN} x {SGD, Adam}. For each task
``measure_critical_batch_size`` trains at batch sizes a factor of 2 apart, with the learning rate tuned at each, until
the loss is at the target, and fits S = S_min (1 + B_crit/B). The callback measures the noise scale along the same
branches. As in figure 4 of McCandlish et al. (arXiv 1812.06162), the picture has one beside the other. Run it from
anywhere; everything it writes goes into ``runs/critical_batch_size/`` of the current directory::

    python examples/critical_batch_size.py

It takes about 20 minutes on one core, and goes on where it was interrupted. ``--controls`` measures five more tasks
that tell what momentum does, in ten more. ``--quick`` only shows that it runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from twelve_tasks import CONTROLS, TASKS, Classifier, Task, images, loader

from lightning_wn import CriticalBatchSizeMeasurement, GradientNoiseScaleCallback, measure_critical_batch_size
from lightning_wn.critical_batch_size import Branch, MeasuredBatchSize, fit_tradeoff, mean_noise_scale

# the images lie in memory: worker processes would only cost time
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
# Lightning 2.6 calls a function that newer versions of torch deprecate
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
# the tensors are tiny: a second thread would only wait for the first
torch.set_num_threads(1)

TARGET_LOSS = 0.1 * math.log(10)
"""A tenth of the loss of a guess among ten classes, for all tasks."""
TARGET_SHARES = (0.25, 0.2, 0.15, 0.1)
"""Of that loss, for the table of other targets."""
BATCH_SIZES = {"digits": [2**k for k in range(2, 10)], "mnist": [2**k for k in range(4, 12)]}
"""More are added until B_crit is a factor of 4 or more from both ends."""
EPOCHS = 120
"""The most that a branch may take; the largest batches need about 65."""
LEARNING_RATE = {"sgd": 0.25, "momentum": 0.025, "adam": 0.01, "adam0": 0.01}
"""Where tuning begins, at the smallest batch size."""
SEEDS = {"digits": (0, 1, 2, 3, 4), "mnist": (0, 1)}
"""The steps of digits are the noisier, as there are fewer images in a branch."""
EMA_DECAY = 0.5
"""|G|² falls a hundredfold within tens of steps, and a longer memory would count what it was: against brute force over
1,000 images at every step the average over a run comes out 1 to 13 % off, and with 0.9 up to half too low."""


def measure(task: Task, directory: Path, sizes: Sequence[int], seeds: Sequence[int]) -> CriticalBatchSizeMeasurement:
    """Train the branches of a task, with more batch sizes where B_crit is too near to the first or the last.

    The largest is at most half of the data. What is trained already is not trained again.
    """
    sizes = list(sizes)
    while True:
        measurement = measure_at(task, directory, sizes, seeds)
        if measurement.critical_batch_size < 4 * sizes[0] and sizes[0] > 1:
            sizes = [sizes[0] // 2, *sizes]
        elif measurement.critical_batch_size > sizes[-1] / 4 and 4 * sizes[-1] <= len(images(task.data)):
            sizes = [*sizes, 2 * sizes[-1]]
        else:
            return measurement


def measure_at(task: Task, directory: Path, sizes: Sequence[int], seeds: Sequence[int]) -> CriticalBatchSizeMeasurement:
    return measure_critical_batch_size(
        lambda: Classifier(task.data, task.network, task.optimizer, LEARNING_RATE[task.optimizer]),
        lambda batch_size: loader(task.data, batch_size),
        sizes,
        method="target_loss",
        target_loss=TARGET_LOSS,
        num_examples=EPOCHS * len(images(task.data)),
        # the best learning rate of one batch size is a good start for the next
        learning_rate="none",
        base_batch_size=BATCH_SIZES[task.data][0],
        tune_learning_rate=2.0,
        seeds=seeds,
        directory=directory,
        trainer_kwargs={
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "callbacks": [GradientNoiseScaleCallback(every_n_steps=1, ema_decay=EMA_DECAY)],
        },
        progress_bar=False,
    )


class UntilTarget(pl.Callback):
    """Keeps the noise scales of every step, and ends training at the target loss."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.noise_scales: dict[str, list[float]] = {"": [], "preconditioned/": []}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for kind, values in self.noise_scales.items():
            if (value := trainer.callback_metrics.get(f"gns/{kind}noise_scale")) is not None:
                values.append(float(value))
        self.losses.append(float(outputs["loss"]))
        count = len(self.losses)
        # the mean over the last third of the steps is the loss after 5/6 of them
        if count >= 12 and statistics.fmean(self.losses[-(count // 3) :]) <= TARGET_LOSS:
            trainer.should_stop = True
            for kind, values in self.noise_scales.items():
                self.noise_scales[kind] = values[: round(len(values) * 5 / 6)]


def look_along(
    task: Task, directory: Path, batch_size: int, learning_rate: float, steps: int, seed: int
) -> dict[str, list[float]]:
    """Train once more to the target, and measure the noise scale in other ways, too."""
    file = directory / "looks" / f"batch_{batch_size}_rate_{learning_rate:g}_seed_{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    pl.seed_everything(seed, verbose=False)
    watch = UntilTarget()
    noise_scale = GradientNoiseScaleCallback(
        every_n_steps=1,
        ema_decay=EMA_DECAY,
        preconditioned=task.optimizer.startswith("adam"),
    )
    trainer = pl.Trainer(
        max_steps=20 * steps,
        accelerator="cpu",
        log_every_n_steps=1,
        callbacks=[noise_scale, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(task.data, task.network, task.optimizer, learning_rate), loader(task.data, batch_size))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(watch.noise_scales))
    return watch.noise_scales


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Attributes:
        task: Its name.
        min_steps: S_min of the fit.
        measured: B_crit of the fit, and its interval.
        batch_size: That which is nearest to its own noise scale, where somebody who follows the advice ends.
        learning_rate: The best there.
        predicted: Mean noise scale along the branches there: the prediction.
        least: Noise scale that was below for a tenth of the run there.
        most: And above.
        preconditioned: Mean noise scale of the gradient as Adam scales it; NaN for SGD.
        quarter_rate: Mean noise scale at a quarter of the learning rate.
    """

    task: str
    min_steps: float
    measured: float
    lower: float
    upper: float
    batch_size: int
    learning_rate: float
    predicted: float
    least: float
    most: float
    preconditioned: float
    quarter_rate: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def within(self) -> bool:
        return 1 / 3 <= self.ratio <= 3


def conclude(task: Task, directory: Path, measurement: CriticalBatchSizeMeasurement, seeds: Sequence[int]) -> Result:
    """Look along training at the batch size that the prediction is taken from."""
    row = next(row for row in measurement.batch_sizes if row.noise_scale == measurement.predicted)
    rate = LEARNING_RATE[task.optimizer] * row.learning_rate_factor
    tuned, quarter = (
        [look_along(task, directory, row.batch_size, rate * factor, round(row.steps), seed) for seed in seeds]
        for factor in (1.0, 0.25)
    )

    def mean(runs: Sequence[Mapping[str, Sequence[float]]], kind: str) -> float:
        means = [mean_noise_scale(run[kind], row.batch_size, [1.0] * len(run[kind])) for run in runs]
        return statistics.median(means)

    along = sorted(value for run in tuned for value in run[""])
    assert measurement.fit is not None
    return Result(
        task=task.name,
        min_steps=measurement.fit.min_steps,
        measured=measurement.critical_batch_size,
        lower=measurement.lower,
        upper=measurement.upper,
        batch_size=row.batch_size,
        learning_rate=rate,
        predicted=measurement.predicted,
        least=along[len(along) // 10],
        most=along[-1 - len(along) // 10],
        preconditioned=mean(tuned, "preconditioned/"),
        quarter_rate=mean(quarter, ""),
    )


def at_other_targets(task: Task, directory: Path) -> list[dict[str, Any]]:
    """The same at higher losses, from the branches on disk; learning rates are the best of those that were tried."""
    runs: dict[int, dict[float, list[Branch]]] = {}
    for file in sorted((directory / "branches").glob("*.json")):
        branch = Branch.from_dict(json.loads(file.read_text()))
        runs.setdefault(branch.plan.batch_size, {}).setdefault(branch.plan.learning_rate_factor, []).append(branch)
    rows = []
    for share in TARGET_SHARES:
        sizes: list[float] = []
        steps: list[float] = []
        noise_scales: dict[int, float] = {}
        for size, rates in sorted(runs.items()):
            reached = [(branches, [b.steps_to(share * math.log(10)) for b in branches]) for branches in rates.values()]
            branches, best = min(reached, key=lambda pair: math.prod(pair[1]))
            sizes += [size] * len(best)
            steps += best
            along = [
                [value for step, value in branch.noise_scales if step <= max(1, end)]
                for branch, end in zip(branches, best, strict=True)
            ]
            noise_scales[size] = statistics.median(mean_noise_scale(run, size, [1.0] * len(run)) for run in along)
        size = min(noise_scales, key=lambda size: abs(math.log(noise_scales[size] / size)))
        measured = fit_tradeoff(sizes, steps).critical_batch_size.value
        rows.append(
            {
                "task": task.name,
                "target_loss": share * math.log(10),
                "measured": measured,
                "predicted": noise_scales[size],
                "ratio": noise_scales[size] / measured,
            }
        )
    return rows


def steps_row(task: Task, row: MeasuredBatchSize) -> dict[str, Any]:
    return {
        "task": task.name,
        "batch_size": row.batch_size,
        "learning_rate": LEARNING_RATE[task.optimizer] * row.learning_rate_factor,
        "steps": row.steps,
        "noise_scale": row.noise_scale,
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Four digits are more than any of these numbers is sure of."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    lines = [
        "| task | S_min | measured B_crit | predicted | ratio | along the run | at batch, learning rate | as Adam "
        "scales it | at a quarter of the rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    adam = {r.task: "" if math.isnan(r.preconditioned) else f"{r.preconditioned:.0f}" for r in results}
    lines += [
        f"| {r.task} | {r.min_steps:.0f} | {r.measured:.0f} ({r.lower:.0f} to {r.upper:.0f}) | {r.predicted:.0f} | "
        f"{r.ratio:.2f}{'' if r.within else ' (miss)'} | {r.least:.0f} to {r.most:.0f} | {r.batch_size}, "
        f"{r.learning_rate:g} | {adam[r.task]} | {r.quarter_rate:.0f} |"
        for r in results
    ]
    return "\n".join(lines)


COLORS = {"sgd": "#0072B2", "momentum": "#56B4E9", "adam": "#D55E00", "adam0": "#E69F00"}
"""Of Okabe & Ito's palette, which colour-blind readers can tell apart."""
MARKERS = {"linear": "s", "mlp": "o", "cnn": "^"}


def draw(results: Sequence[Result]) -> Any:
    """Prediction against measurement, both on log scales."""
    figure, axis = plt.subplots(figsize=(9.2, 6.2), layout="constrained")
    values = [x for r in results for x in (r.measured, r.predicted, r.lower, r.upper, r.least, r.most)]
    positive = [x for x in values if 1 <= x < math.inf]
    ends = [min(positive) / 1.4, max(positive) * 1.4]
    axis.fill_between(ends, [x / 3 for x in ends], [x * 3 for x in ends], color="0.93", linewidth=0)
    axis.plot(ends, ends, color="0.6", linewidth=1)
    for r in results:
        task = (TASKS | CONTROLS)[r.task]
        color = COLORS[task.optimizer]
        line = {"color": color, "linewidth": 1.2, "alpha": 0.5}
        axis.plot([r.measured] * 2, [max(r.least, ends[0]), min(r.most, ends[1])], **line)
        axis.plot([max(r.lower, ends[0]), min(r.upper, ends[1])], [r.predicted] * 2, **line)
        axis.plot(r.measured, r.predicted, label=label(task), **marker(task))
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axis.set_title("One point a task: target loss a tenth of a guess's, learning rate tuned", fontsize=10, loc="left")
    axis.set_xlabel("measured: critical batch size (bar: 95 % interval)")
    axis.set_ylabel("predicted: mean noise scale along the run (bar: 10 % to 90 %)")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        which.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        which.set_minor_locator(mpl.ticker.NullLocator())
    axis.grid(visible=True, color="0.88")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    handles = axis.get_legend_handles_labels()[0]
    handles.append(mpl.lines.Line2D([], [], color="0.6", linewidth=1, label="equal"))
    handles.append(mpl.patches.Patch(color="0.93", label="within a factor of 3"))
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    return figure


def marker(task: Task) -> dict[str, Any]:
    """Colour for the optimizer, shape for the network, full for MNIST."""
    color = COLORS[task.optimizer]
    return {
        "marker": MARKERS[task.network],
        "color": color,
        "markerfacecolor": color if task.data == "mnist" else "white",
        "markersize": 9,
        "markeredgewidth": 1.8,
        "linestyle": "",
    }


def label(task: Task) -> str:
    names = {"mnist": "MNIST", "mlp": "MLP", "cnn": "CNN", "sgd": "SGD", "adam": "Adam"}
    names |= {"momentum": "SGD with momentum", "adam0": "Adam without momentum"}
    return ", ".join(names.get(part, part) for part in (task.data, task.network, task.optimizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = TASKS | CONTROLS
    parser.add_argument("--tasks", nargs="+", choices=known, default=list(TASKS), metavar="TASK", help="; ".join(known))
    parser.add_argument("--directory", type=Path, default=Path("runs/critical_batch_size"), help="for all it writes")
    parser.add_argument("--controls", action="store_true", help="the tasks on momentum, too")
    parser.add_argument("--quick", action="store_true", help="one task, few batch sizes, one seed")
    arguments = parser.parse_args()
    names = ["digits-mlp-sgd"] if arguments.quick else arguments.tasks
    if arguments.controls:
        names = [*names, *(name for name in CONTROLS if name not in names)]
    directory: Path = arguments.directory
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning_wn").setLevel(logging.WARNING)
    mpl.use("Agg")  # works without a display
    results, steps, targets = [], [], []
    for name in names:
        task, began = known[name], time.process_time()
        sizes, seeds = BATCH_SIZES[task.data], SEEDS[task.data]
        if arguments.quick:
            sizes, seeds = sizes[-5::2], seeds[:1]
        measurement = measure(task, directory / name, sizes, seeds)
        results.append(conclude(task, directory / name, measurement, seeds))
        targets += at_other_targets(task, directory / name)
        steps += [steps_row(task, row) for row in measurement.batch_sizes]
        print(f"\n{name}, {time.process_time() - began:.0f} s of processor time\n{measurement}", flush=True)
    write_csv(directory / "results.csv", [asdict(result) | {"ratio": result.ratio} for result in results])
    write_csv(directory / "steps.csv", steps)
    write_csv(directory / "targets.csv", targets)
    print(f"\n{table(results)}")
    plain = [result for result in results if result.task in TASKS]
    if plain:
        draw(plain).savefig(directory / "prediction.png", dpi=120)
        within = sum(result.within for result in plain)
        print(f"\nWithin a factor of 3: {within} of {len(plain)}\nPicture: {directory / 'prediction.png'}")


if __name__ == "__main__":
    main()
