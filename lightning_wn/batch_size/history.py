"""Reading back what ``GradientNoiseScaleCallback`` logged."""

from __future__ import annotations

import csv
from pathlib import Path


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
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = [key for key in (rows[0] if rows else ()) if key.startswith(f"{prefix}/")]
    if not keys:
        raise ValueError(
            f"{path} holds no key that starts with {prefix + '/'!r}; was the model trained with "
            f"`GradientNoiseScaleCallback(prefix={prefix!r})` and for at least `log_every_n_steps` steps?"
        )
    # the logger writes other metrics into rows of their own
    rows = [row for row in rows if any(row[key] for key in keys)]
    return {key: [float(row[key] or "nan") for row in rows] for key in ("step", *keys)}
