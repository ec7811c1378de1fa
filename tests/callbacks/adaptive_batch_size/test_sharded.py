"""AdaptiveBatchSizeCallback under FSDP2 on two ranks: the same training as by hand on one process."""

from __future__ import annotations

import pytest
from helpers.adaptive_runs import changes_in, windows_of
from helpers.processes import SCENARIOS, outcomes, results_of_ranks
from torch.distributed.fsdp import FSDPModule

pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_custom_reduce_scatter"), reason="this torch cannot show its reduce-scatter"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    script = SCENARIOS / "adaptive_sharded.py"
    return results_of_ranks(script, tmp_path_factory.mktemp("adaptive_sharded"))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_along_a_schedule_with_clipping_and_a_scheduler(ranks, optimizer):
    """The windows are those of one device, worked out in test_callback.py; three of the four epochs end short."""
    for outcome in outcomes(ranks, "schedule"):
        found = outcome[optimizer]
        assert found["windows"] == [[1, 1, 2, 2, 2, 3], [3, 3, 3, 2], [1] * 11, [5, 5, 1]]
        # float64 and another order of summing
        assert found["distance"] < 1e-10
        assert found["scheduler"] == 44


def test_toward_the_noise_scale_with_the_callbacks_in_both_orders(ranks):
    both = outcomes(ranks, "noise_scale")
    assert both[0] == both[1]
    one, other = both[0]
    assert one["epochs"] == other["epochs"]
    assert changes_in(one["epochs"]) >= 2
    assert any(windows_of(epoch)[-1] < epoch[-1] for epoch in one["epochs"])
    for found in (one, other):
        assert found["distance"] < 1e-10
        assert found["probe"] == "sharded"
        assert set(found["rejected"].values()) == {0}
        assert found["measured"] == sum(len(windows_of(epoch)) for epoch in found["epochs"])
    # short last windows rescaled before or after the probe reads them
    assert one["noise_scale"] == pytest.approx(other["noise_scale"], rel=1e-9)


def test_gradients_that_are_reduced_once_a_window(ranks):
    for outcome in outcomes(ranks, "held_back"):
        assert outcome["windows"] == [[1, 1, 2, 2, 2, 3], [3, 3, 3, 2]]
        assert outcome["distance"] < 1e-10
        assert outcome["measured"] == 10


def test_examples_are_counted_over_all_ranks(ranks):
    """32 a micro-batch: 96 after 3, where 2 does not divide, so at 4; 330 an epoch."""
    for outcome in outcomes(ranks, "examples"):
        assert outcome["epochs"] == [[1] * 4 + [2] * 7, [2] * 11, [4] * 11]
        assert outcome["counted"] == 990


@pytest.mark.parametrize("kind", ["sharded", "whole"])
def test_resumed_as_if_never_killed(ranks, kind):
    for outcome in outcomes(ranks, "resume"):
        found = outcome[kind]
        assert changes_in(found["epochs"][2:]) >= 1
        assert found["same weights"]
        assert found["same factors"]
        assert found["same state"]
        assert found["noise scales"][0] == found["noise scales"][1]
