"""A batch size that follows the noise scale, beside two that stand still.

A small transformer learns Python's own source, character by character, three ways: with a fixed batch size of at most
0.05 of the noise scale that is measured in mid-run, with one above the noise scale, and with
:class:`~lightning_wn.AdaptiveBatchSizeCallback`, which starts from the small one. The learning rate falls to 0 at the
end of the data, so that the ends can be compared. Run it from anywhere; everything it writes goes into
``runs/adaptive_batch_size/`` of the current directory, and a run that is there already is not made again::

    python examples/adaptive_batch_size.py

It takes about half an hour on one core. ``--quick`` only shows that it runs; ``--tune`` tries the learning rates.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib as mpl
import torch
from character_model import CharacterModel, Sequences, losses, standard_library, train_dataloader
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from lightning_wn import AdaptiveBatchSizeCallback, GradientNoiseScaleCallback

# the text lies in memory: worker processes would only cost time
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
# Lightning 2.6 calls a function that newer versions of torch deprecate
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
# one core, and the same sums in the same order everywhere
torch.set_num_threads(1)

OUTPUT = Path("runs/adaptive_batch_size")
TUNING_SEED = 100
TUNING_RATES = {"small": (0.001, 0.002, 0.004), "large": (0.005, 0.01, 0.02)}
LEARNING_RATES = {"small": 0.004, "large": 0.01}


@dataclass(frozen=True)
class Setting:
    """What all runs of an experiment share.

    Attributes:
        length: Characters in a sequence.
        width: Of the model.
        budget: Sequences that the fixed ways train on.
        more: How many times as many the adaptive way trains on.
        small: The small batch size, in sequences.
        large: The large one.
        measured_every: Optimizer steps from one measurement of the noise scale to the next.
        target: Wished fraction of the noise scale.
        changed_every: Fewest optimizer steps between two changes.
        points: Points of a curve.
        held_out: Held-out sequences that the end is measured on.
        glance: One in so many of these, which a point is measured on.
    """

    length: int = 64
    width: int = 64
    budget: int = 108_000
    more: float = 1.05
    small: int = 4
    large: int = 256
    measured_every: int = 5
    target: float = 0.15
    changed_every: int = 100
    points: int = 32
    held_out: int = 8192
    glance: int = 16


# so short a run has a small noise scale, which a larger share makes up for
QUICK = Setting(
    length=16,
    width=32,
    budget=1600,
    small=2,
    large=64,
    measured_every=1,
    target=1.0,
    changed_every=20,
    points=8,
    held_out=256,
    glance=4,
)


@dataclass(frozen=True)
class Way:
    """One way to choose a batch size.

    Attributes:
        label: For the legend and the table.
        color: Of the palette of Okabe & Ito, which colour-blind readers can tell apart.
        line: The style of its line.
    """

    label: str
    color: str
    line: str


WAYS = {
    "small": Way("fixed small batch", "#D55E00", "--"),
    "large": Way("fixed large batch", "#777777", ":"),
    "adaptive": Way("adaptive batch", "#0072B2", "-"),
}


@dataclass
class Point:
    """Where a run was after some of its data.

    Attributes:
        characters: Seen so far.
        steps: Optimizer steps so far.
        batch_size: Sequences in an optimizer step.
        train_loss: Mean since the point before, in nat per character.
        held_out_loss: Of the same few held-out sequences at every point.
        noise_scale: In sequences; ``lower`` and ``upper`` are its 95 % interval.
    """

    characters: int
    steps: int
    batch_size: int
    train_loss: float
    held_out_loss: float
    noise_scale: float
    lower: float
    upper: float


class Record(pl.Callback):
    """Takes down the points of a run, after the same numbers of sequences in all ways."""

    def __init__(self, setting: Setting, noise_scale: GradientNoiseScaleCallback, held_out: Sequences) -> None:
        self.setting, self.noise_scale, self.held_out = setting, noise_scale, held_out
        self.points: list[Point] = []
        self.seen = 0
        self.batch_size = 0
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        self.batch_size = trainer.accumulate_grad_batches * len(batch[0])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.seen += len(batch[0])
        # Lightning hands the loss over divided by the micro-batches in a step
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        due = (len(self.points) + 1) * self.setting.budget // self.setting.points
        if self.seen < due and not trainer.is_last_batch:
            return
        estimate = self.noise_scale.estimate()
        self.points.append(
            Point(
                characters=self.seen * self.setting.length,
                steps=trainer.global_step,
                batch_size=self.batch_size,
                train_loss=float(torch.stack(self.losses).mean()),
                held_out_loss=float(
                    losses(pl_module, self.held_out, self.setting.held_out, self.setting.glance).mean()
                ),
                noise_scale=estimate.noise_scale,
                lower=estimate.lower,
                upper=estimate.upper,
            )
        )
        self.losses = []


def run(way: str, setting: Setting, seed: int, learning_rate: float) -> dict[str, Any]:
    """Train once; returns the points, and the losses of all held-out sequences at the end.

    Args:
        way: A key of ``WAYS``.
        setting: Of the experiment.
        seed: Of the first weights and of the order of the data, which are the same in all ways.
        learning_rate: The highest, before the callback's factor.
    """
    pl.seed_everything(seed, verbose=False)
    train, held_out = (Sequences(text, setting.length) for text in standard_library())
    batch_size = setting.large if way == "large" else setting.small
    budget = round(setting.budget * setting.more) if way == "adaptive" else setting.budget
    noise_scale = GradientNoiseScaleCallback(every_n_steps=setting.measured_every)
    record = Record(setting, noise_scale, held_out)
    callbacks: list[pl.Callback] = [noise_scale, record]
    if way == "adaptive":
        callbacks.append(AdaptiveBatchSizeCallback(setting.target, every_n_steps=setting.changed_every))
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=callbacks,
        accelerator="cpu",
        devices=1,
        logger=False,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = CharacterModel(learning_rate, length=setting.length, width=setting.width)
    start = time.process_time()
    trainer.fit(model, train_dataloader(train, budget, batch_size, seed))
    return {
        "points": [asdict(point) for point in record.points],
        "losses": losses(model, held_out, setting.held_out).tolist(),
        "seconds": time.process_time() - start,
    }


def run_once(way: str, setting: Setting, seed: int) -> dict[str, Any]:
    """Train unless it is on disk with this very setting."""
    file = OUTPUT / f"{way}_{seed}.json"
    if way != "adaptive":
        setting = replace(setting, target=Setting.target)  # another target does not make these runs others
    rate = LEARNING_RATES["large" if way == "large" else "small"]
    asked = {"setting": asdict(setting), "learning_rate": rate}
    found = json.loads(file.read_text()) if file.exists() else {}
    if any(found.get(key) != value for key, value in asked.items()):
        found = asked | run(way, setting, seed, rate)
        file.write_text(json.dumps(found))
    print(f"{WAYS[way].label}, seed {seed}: {summary(way, seed, found, found)['held_out_loss']:.4f}", flush=True)
    return found


def standard_error(values: Sequence[float], block: int = 64) -> float:
    """Of the mean of values whose neighbours are alike: from the means of blocks of them."""
    means = [statistics.fmean(values[i : i + block]) for i in range(0, len(values) - block + 1, block)]
    return statistics.stdev(means) / math.sqrt(len(means))


def summary(way: str, seed: int, result: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """A run in numbers, beside the one with the small batch and the same seed.

    The noise scale in mid-run is the median of its readings in the middle fifth of the data, with the least and most.
    """
    points = [Point(**point) for point in result["points"]]
    last = points[-1]
    # one reading alone is not precise; they average over a few hundred steps each
    middle = [point for point in points if 0.4 < point.characters / last.characters < 0.6]
    readings = [point.noise_scale for point in middle]
    late = [point.train_loss for point in points if point.characters > 0.9 * last.characters]
    differences = [a - b for a, b in zip(result["losses"], small["losses"], strict=True)]
    reference = small["points"][-1]
    return {
        "way": way,
        "seed": seed,
        "learning_rate": result["learning_rate"],
        "steps": last.steps,
        "steps_ratio": last.steps / reference["steps"],
        "characters": last.characters,
        "characters_ratio": last.characters / reference["characters"],
        "held_out_loss": statistics.fmean(result["losses"]),
        "held_out_loss_error": standard_error(result["losses"]),
        "difference": statistics.fmean(differences),
        "difference_error": standard_error(differences),
        "train_loss": statistics.fmean(late),
        "smallest_batch": min(point.batch_size for point in points),
        "largest_batch": max(point.batch_size for point in points),
        "mid_run_noise_scale": statistics.median(readings),
        "mid_run_least": min(readings),
        "mid_run_most": max(readings),
        "mid_run_fraction": statistics.median(point.batch_size / point.noise_scale for point in middle),
        "seconds": result["seconds"],
    }


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The runs in numbers, as Markdown."""
    lines = [
        "| | seed | optimizer steps | characters | held-out loss | above the small batch | training loss, last tenth | "
        "batch size | noise scale in mid-run | batch / noise scale |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summaries:
        sizes = sorted({row["smallest_batch"], row["largest_batch"]})
        lines.append(
            f"| {WAYS[row['way']].label} | {row['seed']} | {row['steps']:,} (x{row['steps_ratio']:.2f}) | "
            f"{row['characters']:,} (x{row['characters_ratio']:.2f}) | "
            f"{row['held_out_loss']:.4f} ± {row['held_out_loss_error']:.4f} | "
            f"{row['difference']:+.4f} ± {row['difference_error']:.4f} | {row['train_loss']:.4f} | "
            f"{' to '.join(map(str, sizes))} | "
            f"{row['mid_run_noise_scale']:.0f} ({row['mid_run_least']:.0f} to {row['mid_run_most']:.0f}) | "
            f"{row['mid_run_fraction']:.3f} |"
        )
    return "\n".join(lines)


def curves(axis: Any, way: Way, results: Sequence[Mapping[str, Any]], x: str, y: str, **style: Any) -> None:
    """One thin line a seed, and their median."""
    series = [([point[x] for point in r["points"]], [point[y] for point in r["points"]]) for r in results]
    for xs, ys in series:
        axis.plot(xs, ys, color=way.color, linewidth=0.8, alpha=0.6, **{"linestyle": way.line, **style})
    medians = [[statistics.median(v) for v in zip(*(s[i] for s in series), strict=True)] for i in (0, 1)]
    axis.plot(*medians, color=way.color, linewidth=2, label=way.label, **{"linestyle": way.line, **style})


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], summaries: Sequence[Mapping[str, Any]]) -> Any:
    """Loss over steps and over characters, batch size beside noise scale, and the end of every run."""
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 8), layout="constrained")
    (by_steps, by_characters), (sizes, ends) = axes
    ends.axhspan(-0.01, 0.01, color="0.9", label="within 0.01 nat")
    for name, way in WAYS.items():
        curves(by_steps, way, results[name], "steps", "held_out_loss")
        curves(by_characters, way, results[name], "characters", "held_out_loss")
        curves(sizes, way, results[name], "characters", "batch_size", drawstyle="steps-pre")
        for row in (row for row in summaries if row["way"] == name):
            error = 2 * row["difference_error"]
            ends.errorbar(row["steps"], row["difference"], error, fmt="o", color=way.color, capsize=3)
    noise_scale = Way("noise scale in the adaptive runs", "#009E73", "-.")
    curves(sizes, noise_scale, results["adaptive"], "characters", "noise_scale")
    ends.legend(frameon=False, loc="upper right")
    everywhere = [[point["held_out_loss"] for point in r["points"]] for runs in results.values() for r in runs]
    # the beginning would flatten all that comes after it
    top = max(curve[len(curve) // 8] for curve in everywhere)
    by_steps.set_ylim(0.97 * min(map(min, everywhere)), top)
    by_characters.sharey(by_steps)
    for axis, title, x, y in (
        (by_steps, "Loss over steps", "optimizer steps", "held-out loss (nat per character)"),
        (by_characters, "Loss over data", "million characters", "held-out loss (nat per character)"),
        (sizes, "Batch size in use, and the noise scale", "million characters", "sequences"),
        (ends, "The end of every run", "optimizer steps", "held-out loss above the small batch's (nat)"),
    ):
        axis.set(xlabel=x, ylabel=y)
        axis.set_title(title, fontsize=11, loc="left")
        axis.grid(visible=True, color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (by_characters, sizes):
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    few, many = (1.0,), (1.0, 2.0, 5.0)
    for scale, axis, ticks in (
        (by_steps.set_xscale, by_steps.xaxis, few),
        (ends.set_xscale, ends.xaxis, few),
        (sizes.set_yscale, sizes.yaxis, many),
    ):
        scale("log")
        axis.set_major_locator(LogLocator(subs=ticks))
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_minor_formatter(NullFormatter())
    sizes.minorticks_off()
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)


def tune(setting: Setting) -> None:
    """Print the loss that each learning rate gives the fixed ways, with a seed that is not used again."""
    for way, rates in TUNING_RATES.items():
        for rate in rates:
            loss = statistics.fmean(run(way, setting, TUNING_SEED, rate)["losses"])
            print(f"{WAYS[way].label}, learning rate {rate:g}: held-out loss {loss:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a tiny model, few data")
    parser.add_argument("--tune", action="store_true", help="only try learning rates for the fixed batches")
    parser.add_argument("--target", type=float, help="wished fraction of the noise scale, in place of 0.15")
    arguments = parser.parse_args()
    setting, seeds = (QUICK, 1) if arguments.quick else (Setting(), 3)
    if arguments.target is not None:
        setting = replace(setting, target=arguments.target)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    mpl.use("Agg")  # works without a display
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if arguments.tune:
        tune(setting)
        return
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        for way in WAYS:
            results[way].append(run_once(way, setting, seed))
    summaries = [
        summary(way, seed, results[way][seed], results["small"][seed]) for seed in range(seeds) for way in WAYS
    ]
    write_csv(OUTPUT / "summary.csv", summaries)
    write_csv(
        OUTPUT / "curves.csv",
        [{"way": way, "seed": seed, **p} for way in WAYS for seed, r in enumerate(results[way]) for p in r["points"]],
    )
    draw(results, summaries).savefig(OUTPUT / "curves.png", dpi=110)
    print(f"\n{table(summaries)}\n\nPicture: {OUTPUT / 'curves.png'}")


if __name__ == "__main__":
    main()
