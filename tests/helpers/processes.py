"""Runs a script in processes of its own, with a timeout, and leaves none behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

SCENARIOS = Path(__file__).parents[1] / "scenarios"
"""Scripts that tests start as processes of their own."""


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_script(script: Path, *arguments: str, timeout: float = 240, cwd: Path | None = None) -> str:
    """Run a script that may launch ranks; return what it printed, or fail with it."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(tests.parent), str(tests), os.environ.get("PYTHONPATH", ""))),
        "OMP_NUM_THREADS": "1",  # two ranks on two cores
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        # ranks that outlive their parent, or all of them after a timeout
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, f"{script.name} {' '.join(arguments)} exited {process.returncode}:\n{output}"
    return output


def results_of_ranks(script: Path, folder: Path, *arguments: str, ranks: int = 2) -> list[dict[str, Any]]:
    """Run a script that writes FOLDER/rank<r>.json on every rank; return what they hold."""
    run_script(script, str(folder), *arguments, cwd=folder)
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
