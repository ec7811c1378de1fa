"""Two ranks: the same truth, the same estimate on both, no extra communication, nothing lost."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers.frozen_digits import DigitsMLP, assert_true, digits, per_example_gradients, textbook_pair
from helpers.gan import gan_samples
from helpers.processes import SCENARIOS, outcomes, results_of_ranks, run_script


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank says of each scenario."""
    return results_of_ranks(SCENARIOS / "noise_scale_ddp.py", tmp_path_factory.mktemp("ddp"))


@pytest.fixture
def outcome(ranks, request) -> list[Any]:
    """Both ranks' results of one scenario."""
    return outcomes(ranks, request.param)


def scenario(*names: str):
    return pytest.mark.parametrize("outcome", names, indirect=True)


@scenario("ddp")
def test_truth_under_ddp(outcome):
    assert outcome[0] == outcome[1]
    assert outcome[0]["batch_size"] == 64
    assert_true(outcome[0], [32, 32], measurements=600)


@scenario("ddp_and_accumulation")
def test_truth_under_ddp_with_accumulation(outcome):
    assert outcome[0] == outcome[1]
    assert outcome[0]["batch_size"] == 128
    assert_true(outcome[0], [32] * 4)


@scenario("uneven_batch_sizes")
def test_truth_with_uneven_ranks(outcome):
    assert outcome[0] == outcome[1]
    assert outcome[0]["batch_size"] == 120
    assert_true(outcome[0], [96, 24])


@scenario("bit_for_bit")
def test_weights_are_bit_for_bit_the_same(outcome):
    assert outcome == [True, True]


@scenario("collectives")
def test_no_collective_and_no_host_read_between_log_steps(outcome):
    """Of 25 steps, 10 and 20 are log steps: there one collective and some reads, elsewhere none."""
    for without, with_callback in outcome:
        for step in range(1, 25):
            if step % 10:
                assert with_callback[step] == without[step]
            else:
                assert with_callback[step][0] == without[step][0] + 1


@scenario("resumed")
def test_resumed_equals_uninterrupted(outcome):
    for whole, resumed in outcome:
        assert whole["num_measurements"] == 20
        for name in ("grad_sq_norm", "cov_trace", "noise_scale", "lower", "upper", "num_measurements"):
            assert resumed[name] == pytest.approx(whole[name], rel=1e-6)


@scenario("nan_on_one_rank")
def test_nan_on_one_rank_drops_the_step_on_all(outcome):
    assert outcome[0] == outcome[1]
    assert outcome[0]["rejected"]["NON_FINITE"] == 1
    assert outcome[0]["num_measurements"] == 9
    assert math.isfinite(outcome[0]["cov_trace"])


@scenario("sync_batch_norm")
def test_sync_batch_norm_is_refused(outcome):
    for sentences in outcome:
        assert len(sentences) == 2
        for sentence in sentences:
            assert "SyncBatchNorm in 'net.1' mixes their examples; use `Trainer(sync_batchnorm=False)`" in sentence


@scenario("tensor_parallel_ranks")
def test_ranks_that_share_their_batch_are_refused(outcome):
    """What ModelParallelStrategy() is by default."""
    for sentence in outcome:
        assert "data_parallel_size=2" in sentence
        assert "tensor_parallel_size=1" in sentence


@scenario("lossless_communication_hook")
def test_a_users_communication_hook_is_left_alone(outcome):
    assert outcome[0] == outcome[1]
    assert outcome[0]["num_measurements"] == 20


@scenario("lossy_communication_hook")
def test_gradients_that_are_not_averaged_are_caught(outcome):
    for result in outcome:
        assert result["num_measurements"] == 0
        assert result["rejected"]["MISMATCH"] == 20
    assert [result["said"] for result in outcome] == [1, 0]  # once, on rank zero


@scenario("unused_parameters")
def test_parameters_unused_on_one_rank(ranks, outcome):
    assert outcome[0] == outcome[1]
    assert outcome[0]["num_measurements"] == 20
    # the extra layer's gradient is zero, so nothing changes beside the comm hook's run on the same data
    lossless = ranks[0]["lossless_communication_hook"]
    assert outcome[0]["cov_trace"] == pytest.approx(lossless["cov_trace"], rel=1e-3)


@scenario("groups")
def test_groups_are_exact_in_one_step(outcome):
    assert outcome[0] == outcome[1]
    gradients = per_example_gradients(DigitsMLP(), digits(64))
    samples = torch.stack([gradients[rank:32:2].mean(0) for rank in (0, 1)])
    biases = [*range(2048, 2080), *range(2400, 2410)]
    for estimate, columns in zip(outcome[0], (range(2410), range(2080), biases, range(2080, 2410)), strict=True):
        expected = textbook_pair(samples[:, [*columns]], [16, 16])
        # float32 gradients; |G|² is a difference of norms that nearly cancel
        assert estimate["cov_trace"] == pytest.approx(expected[1], rel=1e-4)
        assert estimate["grad_sq_norm"] == pytest.approx(expected[0], rel=1e-4, abs=1e-5 * expected[1])
    assert outcome[0][3]["coverage"] == pytest.approx(330 / 2410)


@scenario("two_networks")
def test_several_optimizers_have_an_estimate_each(outcome):
    assert outcome[0] == outcome[1]
    for said in outcome[0]:
        for name, estimate in zip(("generator", "discriminator"), said, strict=True):
            expected = textbook_pair(gan_samples(name, [slice(0, 32, 2), slice(1, 32, 2)]), [16, 16])
            assert (estimate["probe"], estimate["num_measurements"]) == ("micro_batch", 1)
            assert estimate["cov_trace"] == pytest.approx(expected[1], rel=1e-4)
            assert estimate["grad_sq_norm"] == pytest.approx(expected[0], rel=1e-4, abs=1e-5 * expected[1])


@scenario("static_graph_and_checkpointing", "compiled")
def test_the_same_as_without(ranks, outcome):
    """The very same gradients, up to the order in which a compiler adds."""
    assert outcome[0] == outcome[1]
    assert outcome[0]["num_measurements"] == 3
    for name in ("cov_trace", "grad_sq_norm"):
        assert outcome[0][name] == pytest.approx(ranks[0]["plain_steps"][name], rel=1e-4)


@scenario("iterable")
def test_iterable_data_and_an_epoch_cut_short(outcome):
    """Five batches of a rank are windows of two, two and one."""
    assert outcome[0] == outcome[1]
    assert outcome[0]["num_measurements"] == 3
    assert outcome[0]["batch_size"] == 64


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_estimate_comes_home_from_worker_processes(tmp_path, strategy):
    run_script(SCENARIOS / "noise_scale_spawned.py", str(tmp_path), strategy, cwd=tmp_path)
    outcome = json.loads((tmp_path / "parent.json").read_text())
    assert outcome["num_measurements"] == outcome["saved"] == 40
    assert outcome["batch_size"] == 128
    assert outcome["probe"] == "micro_batch"
    # a float32 metric beside a float64 estimate
    assert outcome["noise_scale"] == pytest.approx(outcome["metric"], rel=1e-6)
    assert outcome["suggested"] == 32 * 2 * max(1, round(outcome["noise_scale"] / 64))
