"""Two ranks initialize as one that holds both their batches; synchronized means likewise."""

import pytest
import torch
from helpers.first_batches import NETS
from helpers.processes import SCENARIOS, run_script
from scenarios.first_batches_on_ranks import initialized


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_script(SCENARIOS / "first_batches_on_ranks.py", str(folder), ranks=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NETS)
def test_ranks_agree_bit_for_bit_and_with_one_that_has_the_joined_batch(ranks, name):
    first, second = (rank["initialized"][name] for rank in ranks)
    whole = initialized(name)
    assert first.keys() == second.keys() == whole.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key])
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-5)


def test_synchronized_means_and_their_gradients_are_those_of_the_joined_batch(ranks):
    for rank in ranks:
        # float64
        torch.testing.assert_close(*rank["centered"]["means"])
        for found, expected in rank["centered"]["gradients"]:
            torch.testing.assert_close(found, expected)
