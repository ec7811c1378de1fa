"""One HTML page about a finished run, from what its logger wrote."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal

from lightning_wn.batch_size.advice import BatchSizeAdvice, advise_batch_size
from lightning_wn.batch_size.run import ObservedRun, RunConfiguration
from lightning_wn.noise_scale.drawing import import_pyplot
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.reports.downsample import downsample
from lightning_wn.reports.history import read_history
from lightning_wn.reports.run_figure import plot_run
from lightning_wn.text import format_count

_MAX_POINTS = 2500
_LOGGED = ("grad_sq_norm", "cov_trace", "noise_scale", "noise_scale_lower", "noise_scale_upper", "batch_size")

_STYLE = """
:root { color-scheme: light dark; --text: #1d1f21; --back: #ffffff; --quiet: #5f6368; --line: #d9dce0; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --back: #15181c; --quiet: #9aa0a6; --line: #3a3f45; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.quiet { color: var(--quiet); } img { width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .9rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td:last-child { text-align: left; }
"""


def write_report(
    folder: str | Path,
    output: str | Path,
    *,
    prefix: str = "gns",
    unit: str = "examples",
    target: float = 1.0,
    accumulate_grad_batches: int | None = None,
    num_ranks: int = 1,
    confidence: float = 0.95,
) -> Path:
    """Write a page with the figures and the advice of a run that was logged with TensorBoard or CSV files.

    Everything is in the one file, for light and dark screens. Long runs are drawn with fewer points, every peak and
    dip kept.

    Args:
        folder: The logger's ``log_dir``, or a folder above a single one.
        output: The file to write.
        prefix: Start of the logged keys.
        unit: What the batch size counts.
        target: The wished batch size over the noise scale.
        accumulate_grad_batches: That of the run, for advice in its terms; the logs do not tell.
        num_ranks: Data-parallel ranks of the run.
        confidence: Level of the logged interval, as given to the callback.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If no logger has written there.
        ModuleNotFoundError: If matplotlib is missing, or tensorboard where only its files are there.
        ValueError: If nothing was logged under the prefix, or several runs lie there.
    """
    history = read_history(folder, prefix=prefix)
    keys = [f"{prefix}/{name}" for name in _LOGGED]
    if missing := [key for key in keys if key not in history]:
        raise ValueError(
            f"{folder} holds no {missing}; give the prefix of one noise scale, such as '{prefix}/optimizer_0' where "
            "there are several optimizers."
        )
    own, steps = {key: history[key] for key in ("step", *keys)}, history["step"]
    grad_sq_norm, cov_trace, noise_scale, lower, upper, batch_size = (history[key][-1] for key in keys)
    estimate = NoiseScaleEstimate(
        grad_sq_norm=grad_sq_norm,
        cov_trace=cov_trace,
        noise_scale=noise_scale,
        lower=lower,
        upper=upper,
        batch_size=batch_size,
        # how many there were is not logged
        num_measurements=len(steps),
        coverage=1.0,
        unit=unit,
        probe="",
        confidence=confidence,
    )
    advice = advise_batch_size(
        estimate,
        RunConfiguration(accumulate_grad_batches=accumulate_grad_batches, num_ranks=num_ranks),
        ObservedRun(ema_decay=math.nan),
        target=target,
    )
    drawn = downsample(own, _MAX_POINTS)
    name = html.escape(_name_of(Path(folder)))
    page = "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Gradient noise scale of {name}</title><style>{_STYLE}</style></head><body>",
            f"<h1>Gradient noise scale of {name}</h1>",
            f'<p class="quiet">{len(steps):,} logged points, steps {steps[0]:,.0f} to {steps[-1]:,.0f}</p>',
            "<h2>Advice</h2>",
            f"<p>At the last logged step the noise scale was {format_count(estimate.noise_scale)} {html.escape(unit)} "
            f"({confidence * 100:g} % interval {format_count(estimate.lower)} to {format_count(estimate.upper)}), and "
            f"the batch size {format_count(estimate.batch_size)}.</p>",
            *(_paragraph(line) for line in advice.sentences()),
            _candidate_table(advice),
            "<h2>The run</h2>",
            _picture(drawn, advice, prefix),
            "</body></html>",
        ]
    )
    path = Path(output)
    path.write_text(page, encoding="utf-8")
    return path


def _name_of(folder: Path) -> str:
    """Return the folder's name, and its parent's where the logger only counted."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-1].startswith("version_") else parts[-1]


def _paragraph(line: str) -> str:
    """Return a sentence in HTML, what stands in backticks as code."""
    return "<p>" + re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(line)) + "</p>"


def _candidate_table(advice: BatchSizeAdvice) -> str:
    rows = zip(*([name, *cells] for name, cells in advice.columns(intervals=True)), strict=True)
    lines = []
    for kind, row in zip(["th", *["td"] * len(advice.candidates)], rows, strict=False):
        lines.append("<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>' if lines else ""


def _picture(history: Mapping[str, Sequence[float]], advice: BatchSizeAdvice, prefix: str) -> str:
    """Return the figure twice, for light and dark, of which a browser takes one."""
    plt, pictures = import_pyplot(), []
    themes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for theme in themes:
        figure, data = plot_run(history, advice, prefix=prefix, theme=theme), BytesIO()
        # the same page for the same run
        with plt.rc_context({"svg.hashsalt": "lightning_wn"}):
            figure.savefig(data, format="svg", metadata={"Date": None}, facecolor=figure.get_facecolor())
        plt.close(figure)
        pictures.append("data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode())
    light, dark = pictures
    text = "Noise scale over steps, its two parts, the trade-off curve, and the efficiency of other batch sizes."
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{text}"></picture>'
    )
