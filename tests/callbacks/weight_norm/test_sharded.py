"""FSDP2: applied before sharding it trains and resumes; the rest is refused in words."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.processes import LIMIT, SCENARIOS, run_script
from helpers.weight_norm_models import Recurrent, Regression, quiet_trainer
from torch.distributed.fsdp import FSDPModule

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm

# older torch cannot run FSDP2 on a CPU
pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_custom_reduce_scatter"), reason="this torch has no FSDP2 for the CPU"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_script(SCENARIOS / "weight_norm_sharded.py", str(folder), cwd=folder, ranks=2)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_the_ranks_agree_and_g_and_v_train(ranks):
    assert ranks[0]["trained"] == ranks[1]["trained"]
    names = set(ranks[0]["trained"])
    assert {"net.0.parametrizations.weight.original0", "net.2.parametrizations.weight.original1"} <= names
    assert not any(name.endswith(".weight") for name in names)


@pytest.mark.parametrize("distributed", [True, False])
def test_resuming_equals_an_uninterrupted_run(ranks, distributed):
    assert ranks[0][f"resumed {distributed}"] == ranks[0]["trained"]


def test_what_sharding_forbids_is_refused_with_the_fix(ranks):
    for rank in ranks:
        assert '`checkpoint="folded"` does not work with sharded parameters' in rank["folded"]
        assert 'pass `checkpoint="parametrized"`' in rank["folded"]
        assert "`fold_on_fit_end=True` does not work with sharded" in rank["folds at the end"]
        assert "before `fully_shard`" in rank["too late"]
        assert "is sharded" in rank["fold"]
        assert "'net.lstm' (LSTM) is sharded" in rank["fold after evaluation"]
        assert '`init="data"` does not work with sharded parameters' in rank["data"]
        assert "'net.0.mean_only_batch_norm'" in rank["means apart"]
        assert "`synchronize=True`" in rank["means apart"]
        assert "`add_mean_only_batch_norm(self)` in `configure_model`, before `fully_shard`" in rank["late means"]


def test_synchronized_means_that_came_before_sharding_train_and_resume(ranks):
    assert ranks[0]["means"] == ranks[1]["means"]
    assert ranks[0]["running"] == ranks[1]["running"]
    assert ranks[0]["means"][0] == ranks[0]["means"][1] != ranks[0]["trained"]
    assert ranks[0]["running"][0] == ranks[0]["running"][1] != [0.0] * 8


def test_recurrent_layers_train_as_on_one_device(ranks):
    assert ranks[0]["recurrent"] == ranks[1]["recurrent"]
    assert set(ranks[0]["recurrent"]) == {"net.lstm.weight_ih_l0", "net.lstm.weight_hh_l0", "net.head"}
    model = Recurrent()
    model.batch_size = 32
    quiet_trainer(WeightNormCallback("net.*"), max_epochs=3).fit(model)
    fold_weight_norm(model)
    for name, weight in ranks[0]["recurrent"].items():
        found = model.get_parameter(name if "lstm" in name else f"{name}.weight")
        # float32; two means of 16 are averaged where there is one of 32
        torch.testing.assert_close(found.tolist(), weight, rtol=1e-4, atol=1e-6)


def test_meta_layers_are_initialized_after_sharding(ranks):
    for rank in ranks:
        # float32 rounding of a norm of eight entries
        assert rank["meta"]["off"] < 1e-6
        # what torch's reset_parameters draws for eight inputs: at most 1/sqrt(8)
        assert 0.05 < rank["meta"]["largest"] <= 8**-0.5
        assert rank["meta"]["trained"]


def test_a_scope_computes_the_same(ranks):
    assert ranks[0]["cached"][0] == ranks[0]["cached"][1]


def test_the_whole_checkpoint_folds_in_one_process(folder, ranks):
    command = [sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(folder / "distributed")]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2, bias=False))
    for file, distributed in ((folder / "distributed.consolidated", True), (folder / "full.ckpt", False)):
        expected = ranks[0][f"half weights {distributed}"]
        state = torch.load(file, weights_only=True)["state_dict"]
        model = Regression(net)
        names = apply_weight_norm(model)
        model.load_state_dict(state)
        assert fold_weight_norm(model) == names == ["net.0", "net.2"]
        for name, weight in expected.items():
            # the shards are summed as the whole is, but by another kernel
            torch.testing.assert_close(model.get_submodule(name).weight.tolist(), weight, rtol=1e-6, atol=1e-7)
    plain = Regression(net)
    quiet_trainer(WeightNormCallback()).test(plain, ckpt_path=folder / "full.ckpt", verbose=False)
    torch.testing.assert_close(plain.net[0].weight.tolist(), expected["net.0"], rtol=1e-6, atol=1e-7)
