"""AdaptiveBatchSizeCallback on two ranks: the same decision on both, and the training that it says."""

from __future__ import annotations

import pytest
from helpers.adaptive_runs import changes_in, windows_of
from helpers.processes import SCENARIOS, results_of_ranks

SCRIPT = SCENARIOS / "adaptive_ddp.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of_ranks(SCRIPT, tmp_path_factory.mktemp("adaptive_ddp"), "ddp")


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


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_worker_processes_train_as_by_hand_and_the_result_comes_home(strategy, tmp_path):
    """`ddp_notebook` is `ddp_fork` in a notebook. The third and fourth epoch go on from a checkpoint."""
    (parent,) = results_of_ranks(SCRIPT, tmp_path, strategy, ranks=1)
    run = parent["workers"]
    assert changes_in(run["epochs"]) >= (2 if strategy == "ddp_fork" else 1)
    assert any(windows_of(epoch)[-1] < epoch[-1] for epoch in run["epochs"])
    # float64 and another order of summing
    assert run["error"] < 1e-10
    ends = [2] if strategy == "ddp_spawn" else [2, 4]
    for said, end in zip(run["said"], ends, strict=True):
        assert said["factor"] == said["rate"] == run["epochs"][end - 1][-1]
        assert said["trainers"] == 1
        assert said["measured"] == sum(len(windows_of(epoch)) for epoch in run["epochs"][:end])
    # what the parent would write is what the worker wrote
    assert run["said"][0]["state"] == run["saved"]
