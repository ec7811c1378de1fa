"""The quickstart on two processes: DistributedDataParallel on the CPU.

Each optimizer step has four micro-batches again, two on each rank. Run it from anywhere; everything it writes
goes into ``runs/ddp/`` of the current directory::

    python examples/ddp.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quickstart import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=8)
    max_epochs = parser.parse_args().max_epochs
    train(Path("runs/ddp"), max_epochs, accumulate_grad_batches=2, devices=2, strategy="ddp")


if __name__ == "__main__":
    main()
