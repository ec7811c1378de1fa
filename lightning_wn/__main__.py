"""The command line: ``python -m lightning_wn report LOGDIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_wn import __version__
from lightning_wn.arguments import is_whole
from lightning_wn.noise_scale.drawing import import_pyplot
from lightning_wn.reports.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 where it did what was asked, and 1 with one sentence on stderr where it could not."""
    parser = argparse.ArgumentParser(prog="python -m lightning_wn", description="The gradient noise scale of a run.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write one HTML page about a finished run")
    report.add_argument("folder", metavar="LOGDIR", help="folder of CSVLogger or TensorBoardLogger")
    report.add_argument("--output", default="report.html", help="file to write (default: %(default)s)")
    report.add_argument("--prefix", default="gns", help="start of the logged keys (default: %(default)s)")
    report.add_argument("--unit", default="examples", help="what the batch size counts (default: %(default)s)")
    report.add_argument("--target", type=float, default=1.0, help="wished batch size over the noise scale (default: 1)")
    report.add_argument("--accumulate", type=_positive, dest="accumulate_grad_batches", metavar="ACCUMULATE",
                        help="accumulate_grad_batches of the run; logs do not tell")  # fmt: skip
    report.add_argument("--ranks", type=_positive, dest="num_ranks", metavar="RANKS", default=1,
                        help="data-parallel ranks of the run (default: 1)")  # fmt: skip
    report.add_argument("--confidence", type=float, default=0.95, help="level of the logged interval (default: 0.95)")
    given = vars(parser.parse_args(arguments))
    del given["command"]
    try:
        # a page needs no display
        import_pyplot().switch_backend("Agg")
        path = write_report(**given)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    return 0


def _positive(text: str) -> int:
    if not is_whole(number := int(text)):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
