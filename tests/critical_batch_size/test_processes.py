"""A measurement that is killed, and one on two ranks."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from helpers.adaptive_runs import OPTIMIZERS, Model
from helpers.frozen_digits import digits
from helpers.processes import LIMIT, SCENARIOS, end_script, run_script, start_script
from scenarios.critical_batch_size import SIZES, measure
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

SCRIPT = SCENARIOS / "critical_batch_size.py"


def test_killed_and_resumed(tmp_path):
    """SIGKILL in the middle of the second of three branches; the result is that of a measurement left in peace."""
    process = start_script(SCRIPT, str(tmp_path), "is_killed", logs=tmp_path)
    try:
        end = time.monotonic() + LIMIT
        while not (tmp_path / "waits").exists():
            assert process.is_alive()
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        end_script(process)
    finished = [path.name for path in (tmp_path / "cut" / "branches").iterdir()]
    assert finished == ["batch_16_rate_1_seed_0.json"]
    written = (tmp_path / "cut" / "branches" / finished[0]).stat().st_mtime_ns
    resumed = measure(tmp_path / "cut")
    assert (tmp_path / "cut" / "branches" / finished[0]).stat().st_mtime_ns == written
    assert resumed == measure(tmp_path / "whole")
    assert (tmp_path / "cut" / "results.csv").read_text() == (tmp_path / "whole" / "results.csv").read_text()


def test_two_ranks(tmp_path):
    """Each batch is half on each rank: losses are means over both, and both ranks have the same result."""
    run_script(SCRIPT, str(tmp_path), "two_ranks", ranks=2)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    assert results[0][0] == results[0][1]
    branch = json.loads((tmp_path / "two" / "branches" / "batch_64_rate_1_seed_0.json").read_text())
    data = digits(640, torch.float64)
    # the sampler of Lightning shuffles with the seed and the epoch
    ranks = [DataLoader(data, 32, sampler=DistributedSampler(data, 2, rank, seed=0)) for rank in (0, 1)]
    model = Model("adam")
    optimizer = OPTIMIZERS["adam"](model.parameters())
    optimizer.param_groups[0]["lr"] *= math.sqrt(64 / SIZES[0])
    expected = []
    for pair in zip(*ranks, strict=True):
        optimizer.zero_grad()
        loss = sum(nn.functional.cross_entropy(model(x), y) for x, y in pair) / 2
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert branch["curve"]["losses"] == pytest.approx(expected, rel=1e-9)
    assert branch["curve"]["examples"] == [64.0 * (i + 1) for i in range(10)]
