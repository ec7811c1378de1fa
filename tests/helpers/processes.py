"""Runs scripts in processes of their own, with a limit, and leaves none behind.

A process that imports torch and Lightning takes seconds to start. So one that has imported them waits, and every script
runs in a fork of it: a real process, which has done nothing yet but import.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

TESTS = Path(__file__).parents[1]
SCENARIOS = TESTS / "scenarios"
"""Scripts that tests start as processes of their own."""
LIMIT = 1800.0
"""Seconds after which a process is taken to hang, however busy the machine is."""

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lightning.pytorch", "sklearn.datasets", "torch.distributed.fsdp"])


def start_script(
    script: Path, *arguments: str, logs: Path, cwd: Path | None = None, rank: int | None = None, port: int = 0
) -> BaseProcess:
    """Start a script, as one of several ranks or as one that may launch its own.

    What it prints goes to the files stdout and stderr of the folder ``logs``, with the rank behind them.
    """
    environment = {
        "OMP_NUM_THREADS": "1",  # two ranks on two cores
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", ""))),
        "MASTER_ADDR": "127.0.0.1",
    }
    if port:
        environment["MASTER_PORT"] = str(port)
    if rank is not None:
        environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    arguments = (str(script), *arguments)
    process = _FORKS.Process(target=_run, args=(arguments, environment, str(cwd or Path.cwd()), str(logs)))
    process.start()
    return process


def end_script(process: BaseProcess) -> None:
    """Kill a script, and all that it has launched."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # where it has no group of its own yet
    process.join()


def run_script(script: Path, *arguments: str, cwd: Path | None = None, ranks: int | None = None) -> tuple[str, str]:
    """Run a script, on so many ranks or on one that may launch others; return stdout and stderr, or fail with them."""
    with tempfile.TemporaryDirectory() as logs, free_port() as port:
        processes = [
            start_script(script, *arguments, logs=Path(logs), cwd=cwd, rank=rank if ranks else None, port=port)
            for rank in range(ranks or 1)
        ]
        try:
            end = time.monotonic() + LIMIT
            # a rank that failed leaves the others waiting for it
            while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
                if time.monotonic() > end:
                    break
                time.sleep(0.02)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                end_script(process)
        stdout, stderr = (
            "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(Path(logs).glob(f"{name}*")))
            for name in ("stdout", "stderr")
        )
    assert codes == [0] * len(codes), f"{script.name} {' '.join(arguments)} exited {codes}:\n{stdout}\n{stderr}"
    return stdout, stderr


def _run(arguments: Sequence[str], environment: dict[str, str], cwd: str, logs: str) -> None:
    """Be the script."""
    os.setpgid(0, 0)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        with Path(logs, name + environment.get("LOCAL_RANK", "")).open("wb", buffering=0) as file:
            os.dup2(file.fileno(), stream)
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT", "DISPLAY", "MPLBACKEND"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = [str(Path(arguments[0]).parent), str(TESTS.parent), str(TESTS)]
    sys.argv = list(arguments)
    # Lightning looks for the rank when it is imported, which was before
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))
    runpy.run_path(sys.argv[0], run_name="__main__")


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody else is given meanwhile: it stays bound, and ranks can listen on it all the same."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def results_of_ranks(script: Path, folder: Path, *arguments: str, ranks: int = 2) -> list[dict[str, Any]]:
    """Run a script that writes FOLDER/rank<r>.json on every rank; return what they hold. One rank may launch others."""
    run_script(script, str(folder), *arguments, cwd=folder, ranks=ranks if ranks > 1 else None)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def outcomes(results: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """All ranks' results of one scenario; what it raised on a rank fails the test."""
    found = [rank[name] for rank in results]
    for outcome in found:
        if isinstance(outcome, dict) and "error" in outcome:
            pytest.fail(outcome["error"])
    return found


def write_scenarios(scenarios: Sequence[Callable[[str], Any]], folder: str, names: Sequence[str] = ()) -> None:
    """Run scenarios, or those named, on a rank, and write what they return to FOLDER/rank<r>.json."""
    results: dict[str, Any] = {}
    for scenario in scenarios:
        if names and scenario.__name__ not in names:
            continue
        try:
            results[scenario.__name__] = scenario(folder)
        except BaseException:  # one failure must not hide the other results
            results[scenario.__name__] = {"error": traceback.format_exc()}
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))
