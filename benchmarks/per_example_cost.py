"""Draw what a measured step costs against model width and sequence length, beside a plain one in the same run.

Transformers of two layers, 1,024 tokens a step. CPU seconds of one thread, so that other work on the machine counts
less. Run it with ``python benchmarks/per_example_cost.py``; the figure goes to docs/images/per_example_cost.png.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from per_example_overhead import LinearAttention, TorchAttention, clock, medians

TOKENS = 1024
KINDS = {"attention of Linear layers": LinearAttention, "nn.MultiheadAttention": TorchAttention}
WIDTHS = [64, 128, 256, 512, 768]
LENGTHS = [16, 32, 64, 128, 256, 512, 1024]
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "per_example_cost.png"


def ratio(kind: str, width: int, length: int, repeats: int) -> float:
    plain, measured = medians(
        KINDS[kind], width, 2, TOKENS // length, length, repeats=repeats, now=clock(cpu_time=True)
    )
    print(f"{kind}, d={width}, {TOKENS // length}x{length} tokens: {measured / plain:.3f}x", flush=True)
    return measured / plain


def main(repeats: int) -> None:
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for kind, color, marker in zip(KINDS, ("tab:blue", "tab:orange"), ("o", "s"), strict=True):
        by_width = [ratio(kind, width, 128, repeats) for width in WIDTHS]
        by_length = [ratio(kind, 256, length, repeats) for length in LENGTHS]
        for axis, x, y in zip(axes, (WIDTHS, LENGTHS), (by_width, by_length), strict=True):
            axis.plot(x, y, color=color, marker=marker, label=kind)
    labels = ("width d (128 tokens an example)", "tokens an example (d = 256)")
    for axis, x, label in zip(axes, (WIDTHS, LENGTHS), labels, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(n) for n in x])
        axis.set_xlabel(label)
        axis.axhline(1.0, color="gray", linewidth=1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("measured step / plain step")
    axes[0].set_ylim(bottom=0.95)
    axes[0].legend(frameon=False)
    figure.suptitle("Cost of exact per-example gradient norms, two layers, 1,024 tokens a step", fontsize=11)
    figure.savefig(FIGURE, dpi=130)
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main(arguments.repeats)
