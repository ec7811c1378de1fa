"""AdaptiveBatchSizeCallback on two ranks: the same decision on both, and the training that it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adaptive_runs import changes_in
from processes import run_script

SCRIPT = Path(__file__).parent / "adaptive_ddp_scenarios.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptive_ddp")
    run_script(SCRIPT, str(folder), "ddp", cwd=folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_decide_alike_and_train_as_by_hand(ranks):
    first, second = (rank["noise"] for rank in ranks)
    assert first["epochs"] == second["epochs"]
    assert changes_in(first["epochs"]) >= 2
    # float64 and another order of summing
    assert max(first["error"], second["error"]) < 1e-10
    assert first["rejected"]["MISMATCH"] == 0


def test_examples_are_counted_over_all_ranks(ranks):
    """24 a micro-batch: 72 after 3, where 2 does not divide, so at 4; 240 after the first epoch of 10."""
    for rank in ranks:
        assert rank["examples"]["epochs"] == [[1] * 4 + [2] * 6, [4] * 10]
        assert rank["examples"]["counted"] == 480


def test_the_result_comes_home_from_forked_processes(tmp_path):
    run_script(SCRIPT, str(tmp_path), "ddp_fork", cwd=tmp_path)
    home = json.loads((tmp_path / "rank0.json").read_text())["home"]
    # 11 batches over two ranks are 6: windows of 1, 1, 1, 1 and 2 of 4
    assert home == {"factor": 4, "rate": 2.0}
