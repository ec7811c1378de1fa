"""The command line: ``python -m lightning_wn report LOGDIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 where it did what was asked, and 1 with one sentence on stderr where it could not."""
    parser = argparse.ArgumentParser(prog="python -m lightning_wn", description="The gradient noise scale of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write one HTML page about a finished run")
    report.add_argument("folder", metavar="LOGDIR", help="folder of CSVLogger or TensorBoardLogger")
    report.add_argument("--output", default="report.html", help="file to write (default: %(default)s)")
    report.add_argument("--prefix", default="gns", help="start of the logged keys (default: %(default)s)")
    report.add_argument("--unit", default="examples", help="what the batch size counts (default: %(default)s)")
    report.add_argument("--target", type=float, default=1.0, help="wished batch size over the noise scale (default: 1)")
    report.add_argument("--accumulate", type=_positive, help="accumulate_grad_batches of the run; logs do not tell")
    report.add_argument("--ranks", type=_positive, default=1, help="data-parallel ranks of the run (default: 1)")
    report.add_argument("--confidence", type=float, default=0.95, help="level of the logged interval (default: 0.95)")
    given = parser.parse_args(arguments)
    try:
        path = _report(given)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    return 0


def _report(given: argparse.Namespace) -> Path:
    from lightning_wn.noise_scale.drawing import import_pyplot  # noqa: PLC0415 - the same
    from lightning_wn.reports.page import write_report  # noqa: PLC0415 - matplotlib is optional

    # a page needs no display
    import_pyplot().switch_backend("Agg")
    return write_report(
        given.folder,
        given.output,
        prefix=given.prefix,
        unit=given.unit,
        target=given.target,
        accumulate_grad_batches=given.accumulate,
        num_ranks=given.ranks,
        confidence=given.confidence,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
