"""Every cell of docs/support.md for two ranks: ``python support.py FOLDER COLUMN [ROW ...]``.

COLUMN is ``ddp`` or ``sharded``, whose cells all run in one pair of processes, and each rank writes what it says to
FOLDER/rank<r>.json; or ``launched``, for the strategies that start their own pair, and this process writes rank0.json.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
from helpers.support_cells import IMPOSSIBLE, LAUNCHED, ROWS, cell


def main(folder: Path, column: str, *wanted: str) -> None:
    if column == "launched":
        (folder / "rank0.json").write_text(json.dumps({LAUNCHED: cell(LAUNCHED, "ddp").measure(folder)}))
        return
    results = {}
    for name in wanted or ROWS:
        if column in IMPOSSIBLE[name] or name == LAUNCHED:
            continue
        print(name, flush=True)  # which one hangs, where one does
        try:
            results[name] = cell(name, column).measure(folder)
        except BaseException:  # one failure must not hide the other results
            results[name] = {"error": "", "message": traceback.format_exc(), "steps": -1}
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(Path(sys.argv[1]), *sys.argv[2:])
