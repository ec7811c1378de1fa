import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import pytest
from helpers.processes import LIMIT, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"
KEYS = {
    f"gns/{name}"
    for name in (
        "noise_scale", "noise_scale_lower", "noise_scale_upper", "grad_sq_norm", "cov_trace", "batch_size",
        "suggested_batch_size",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """An example that ran to its end."""

    folder: Path
    stdout: str
    stderr: str

    def require_results(self):
        """Check everything that a reader of the example is promised."""
        output = self.stdout + self.stderr
        assert not re.search("warning|deprecated|traceback", output, re.IGNORECASE), output
        assert re.search(
            r"Noise scale [\d.,e+]+ examples \(95 % interval [\d.,]+ to \S+; \d+ measurements", self.stdout
        )
        assert "batch size" in self.stdout
        accuracy = re.search(r"Validation accuracy: ([\d.]+)%", self.stdout)
        assert accuracy
        assert float(accuracy[1]) > 50
        assert f"tensorboard --logdir {Path('runs', self.folder.name, 'tensorboard')}" in self.stdout

        image = matplotlib.image.imread(self.folder / "noise_scale.png")
        height, width = image.shape[:2]
        assert 1000 < width < 2000
        assert 400 < height < 1200
        assert image[..., :3].std() > 0.02, "the picture is blank"

        with (self.folder / "csv" / "version_0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert set(rows[0]) >= KEYS
        assert all(any(row[key] for row in rows) for key in KEYS)
        events = EventAccumulator(str(self.folder / "tensorboard" / "version_0"))
        events.Reload()
        assert set(events.Tags()["scalars"]) >= KEYS
        assert {event.value for event in events.Scalars("gns/batch_size")} == {32}
        # everything lies below one folder
        assert [path.name for path in self.folder.parent.parent.iterdir()] == ["runs"]


def _is_alive(process_group):
    states = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    # a zombie has ended, and waits for the first process of the system to take note
    return any(int(group) == process_group and state[0] != "Z" for group, state in map(str.split, states.splitlines()))


def run_afresh(script, arguments, folder):
    """Run an example in a new interpreter, as its user does."""
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # a process group of its own, so that what it leaves behind can be found and ended
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, stdout + stderr
        # the other ranks end by themselves, a moment after rank 0
        end = time.monotonic() + LIMIT
        while _is_alive(process.pid):
            assert time.monotonic() < end, "processes are left behind"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return stdout, stderr


@pytest.fixture
def run_example(tmp_path):
    """Runs an example in an empty folder, in a new interpreter or in a fork of one that has imported what it needs."""

    def run(script, *arguments, afresh=True):
        path = EXAMPLES / script
        outputs = run_afresh(path, arguments, tmp_path) if afresh else run_script(path, *arguments, cwd=tmp_path)
        return Finished(tmp_path / "runs" / path.stem, *outputs)

    return run
