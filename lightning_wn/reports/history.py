"""Reading back what ``GradientNoiseScaleCallback`` logged."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lightning_wn.text import some

_Scalars: TypeAlias = dict[str, tuple[list[float], list[float]]]
"""Steps and values by key."""


def read_csv_history(folder: str | Path, *, prefix: str = "gns") -> dict[str, list[float]]:
    r"""Read the noise scale over training from a folder written by Lightning's ``CSVLogger``.

    Args:
        folder: ``CSVLogger.log_dir``, which holds ``metrics.csv``, or that file itself.
        prefix: Start of the logged keys, as given to the callback.

    Returns:
        ``"step"`` and every key that starts with the prefix, each with one number per log entry, in order.
        A value that an entry lacks is NaN.

    Raises:
        FileNotFoundError: If there is no such file; the ``CSVLogger`` writes it at the end of a fit at the latest.
        ValueError: If nothing in the file starts with the prefix.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "metrics.csv").write_text(
        ...         "step,loss,gns/noise_scale\n0,0.5,\n4,,60.0\n9,,inf\n", encoding="utf-8")
        ...     read_csv_history(folder)
        {'step': [4.0, 9.0], 'gns/noise_scale': [60.0, inf]}
    """
    path = Path(folder)
    if path.is_dir():
        path /= "metrics.csv"
    return _joined(_read_csv(path), prefix, path)


def read_history(folder: str | Path, *, prefix: str = "gns") -> dict[str, list[float]]:
    """Read the noise scale over training from a folder of ``CSVLogger`` or ``TensorBoardLogger``.

    Args:
        folder: The ``log_dir`` of either, or a folder above a single one.
        prefix: Start of the logged keys, as given to the callback.

    Returns:
        As :func:`read_csv_history`.

    Raises:
        FileNotFoundError: If neither has written there.
        ModuleNotFoundError: If only TensorBoard has, and ``tensorboard`` is not installed.
        ValueError: If nothing was logged under the prefix, or several runs lie there.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"There is no folder {root}; give the `log_dir` of a logger.")
    tables = [root] if root.is_file() else sorted(root.rglob("metrics.csv"))
    scalars = _read_csv(_only(tables, root)) if tables else _read_tensorboard(root)
    return _joined(scalars, prefix, folder)


def _only(runs: Sequence[Path], root: Path) -> Path:
    if len(runs) > 1:
        folders = some(run.parent if run.is_file() else run for run in runs)
        raise ValueError(f"{root} holds {len(runs)} runs; give the folder of one: {folders}.")
    return runs[0]


def _read_csv(path: Path) -> _Scalars:
    """Read a file of ``CSVLogger``; what is no number is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        scalars: _Scalars = {name: ([], []) for name in names if name != "step"}
        if "step" not in names:
            return {}
        step_at = names.index("step")
        for row in rows:
            step = float(row[step_at] or "nan")
            for name, cell in zip(names, row, strict=False):
                if cell and name != "step":
                    try:
                        value = float(cell)
                    except ValueError:
                        continue
                    steps, values = scalars[name]
                    steps.append(step)
                    values.append(value)
    return scalars


def _read_tensorboard(root: Path) -> _Scalars:
    folders = sorted({path.parent for path in root.rglob("events.out.tfevents.*")})
    if not folders:
        raise FileNotFoundError(
            f"{root} holds neither `metrics.csv` nor TensorBoard's event files; give the `log_dir` of a logger."
        )
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading TensorBoard's files needs tensorboard, which is not installed; run `pip install tensorboard`."
        ) from error
    scalars: _Scalars = {}
    for path in sorted(_only(folders, root).glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = _number(value)
                if number is not None:
                    steps, values = scalars.setdefault(value.tag, ([], []))
                    steps.append(float(event.step))
                    values.append(number)
    return scalars


def _number(value: Any) -> float | None:
    """Return a scalar of an event file, in either of the two forms that torch and TensorFlow write."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor") and not value.tensor.tensor_shape.dim and value.tensor.float_val:
        return float(value.tensor.float_val[0])
    return None


def _joined(scalars: _Scalars, prefix: str, folder: str | Path) -> dict[str, list[float]]:
    """Join the series of a prefix by their steps; a value that a step lacks is NaN."""
    keys = [key for key in scalars if key.startswith(f"{prefix}/")]
    if not keys:
        raise ValueError(
            f"{folder} holds no key that starts with {prefix + '/'!r}; was the model trained with "
            f"`GradientNoiseScaleCallback(prefix={prefix!r})` and for at least `log_every_n_steps` steps?"
        )
    # a resumed run may have logged a step twice: the later one stands
    columns = {key: dict(zip(*scalars[key], strict=True)) for key in keys}
    steps: Sequence[float] = sorted(set().union(*columns.values()))
    joined = {key: [column.get(step, math.nan) for step in steps] for key, column in columns.items()}
    return {"step": list(steps)} | joined
