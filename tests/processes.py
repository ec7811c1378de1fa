"""Runs a script in processes of its own, with a timeout, and leaves none behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_script(script: Path, *arguments: str, timeout: float = 240, cwd: Path | None = None) -> str:
    """Run a script that may launch ranks; return what it printed, or fail with it."""
    tests = Path(__file__).parent
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
