"""Every cell of the tables in docs/support.md is run, and gives what the table says."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.processes import SCENARIOS, results_of_ranks
from helpers.support_cells import COLUMNS, IMPOSSIBLE, LAUNCHED, ONE_DEVICE, ROWS, Run, cell
from helpers.support_models import Net, Normalized
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch.distributed.fsdp import FSDPModule

from lightning_wn.probes.choice import PROBES, choose_probe

DOCS = Path(__file__).parents[3] / "docs" / "support.md"
NEVER = "\N{EN DASH}"
WORDS = ("exact", "approximate", "left out", "refused", NEVER)
SIXTEEN_BITS = ("bf16-true", "bf16-mixed", "16-mixed with a loss scaler, first step skipped")


def tables() -> list[dict[str, list[str]]]:
    """The tables of the page, each from the first column to the words of the others, without footnote marks."""
    found: list[dict[str, list[str]]] = []
    for block in re.split(r"\n\s*\n", DOCS.read_text(encoding="utf-8")):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if len(lines) > 2:
            rows = [[re.sub(r"\[\^\w+\]", "", part).strip() for part in line.split("|")[1:-1]] for line in lines[2:]]
            found.append({row[0]: row[1:] for row in rows})
    return found


FEATURES, STRATEGIES = tables()
CELLS = [
    (name, column, word)
    for name, words in FEATURES.items()
    for column, word in zip(COLUMNS, words, strict=True)
    if word != NEVER
]


def test_the_table_has_the_rows_of_the_code():
    assert list(FEATURES) == list(ROWS)
    for name, words in FEATURES.items():
        assert set(words) <= set(WORDS)
        assert tuple(c for c, word in zip(COLUMNS, words, strict=True) if word == NEVER) == tuple(
            c for c in COLUMNS if c in IMPOSSIBLE[name]
        )


def test_every_footnote_is_there():
    text = DOCS.read_text(encoding="utf-8")
    used, written = set(re.findall(r"\[\^\w+\](?!:)", text)), set(re.findall(r"^(\[\^\w+\]):", text, re.MULTILINE))
    assert used == written
    for line in text.splitlines():
        for part in line.split("|")[2:-1]:
            assert NEVER not in part or re.search(NEVER + r"\[\^\w+\]", part), f"a footnote has to say why: {line}"


# ---------------------------------------------------------------- the runs


def ranks(tmp_path_factory, column: str, count: int = 2) -> list[dict[str, Any]]:
    return results_of_ranks(SCENARIOS / "support.py", tmp_path_factory.mktemp(column), column, ranks=count)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> list[dict[str, Any]]:
    return ranks(tmp_path_factory, "ddp")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> list[dict[str, Any]]:
    if not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        pytest.skip("this torch cannot show its reduce-scatter")
    return ranks(tmp_path_factory, "sharded")


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> list[dict[str, Any]]:
    return ranks(tmp_path_factory, "launched", 1)


@pytest.mark.parametrize(("name", "column", "word"), CELLS, ids=[f"{column}-{name}" for name, column, _ in CELLS])
def test_cell(name, column, word, request, tmp_path):
    run = cell(name, column)
    if name == LAUNCHED:
        assert_outcome(run, name, word, request.getfixturevalue("launched")[0][name])
    elif column in ONE_DEVICE:
        assert_outcome(run, name, word, run.measure(tmp_path))
    else:
        outcomes = [rank[name] for rank in request.getfixturevalue(column)]
        assert outcomes[0] == outcomes[1]
        assert_outcome(run, name, word, outcomes[0])


def assert_outcome(run: Run, name: str, word: str, outcome: dict[str, Any]) -> None:
    if word == "refused":
        assert outcome.get("error") == "ValueError", outcome
        assert outcome["steps"] == 0
        assert run.fix
        assert run.fix in outcome["message"]
        assert "\n" not in outcome["message"]
        return
    assert "error" not in outcome, outcome["message"]
    # float32 gradients, and a difference of norms; 16 bits have 8 or 11 bits of mantissa
    tolerance = 0.1 if name in SIXTEEN_BITS else 1e-4
    for estimate, expected in zip(outcome["estimates"], run.expected(), strict=True):
        assert estimate["probe"] == run.probe
        assert estimate["approximate"] == (run.probe == "consecutive")
        # the word of the table is the strongest that is true
        exact = not estimate["approximate"] and name not in SIXTEEN_BITS
        assert word == ("left out" if run.left_out_from is not None else "exact" if exact else "approximate")
        left_out = {"NON_FINITE": run.skipped} if run.skipped else {}
        left_out |= {"SINGLE_SAMPLE": expected["single"]} if expected["single"] else {}
        left_out |= {"MISMATCH": expected["num_measurements"]} if run.left_out_from is not None else {}
        assert estimate["rejected"] == left_out
        assert estimate["num_measurements"] == expected["num_measurements"] > 0
        assert estimate["cov_trace"] == pytest.approx(expected["cov_trace"], rel=tolerance)
        assert estimate["grad_sq_norm"] == pytest.approx(expected["grad_sq_norm"], rel=tolerance)
        assert estimate["coverage"] == pytest.approx(run.coverage())
    for group, missing in run.groups.items():
        count, cov_trace = outcome["others"][group]
        assert math.isfinite(cov_trace)
        if missing < 0:
            assert count > 0
        else:
            assert count == outcome["estimates"][0]["num_measurements"] - missing * (run.column != "consecutive")


# ---------------------------------------------------------------- strategies


def bare(strategy_class: type) -> Any:
    """A strategy that has started nothing."""
    return object.__new__(strategy_class)


def model_parallel(data_parallel: int, tensor_parallel: int) -> Any:
    strategy = bare(ModelParallelStrategy)
    sizes = {"data_parallel": data_parallel, "tensor_parallel": tensor_parallel}
    strategy._device_mesh = {name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()}
    return strategy


SETTINGS: dict[str, tuple[Any, int, type[Net]]] = {
    "one device": (bare(SingleDeviceStrategy), 1, Net),
    "one device, BatchNorm or `torch.compile`": (bare(SingleDeviceStrategy), 1, Normalized),
    "`ddp` on one device": (bare(DDPStrategy), 1, Net),
    "`ddp` on several devices": (bare(DDPStrategy), 2, Net),
    "`ddp_spawn`, `ddp_fork`, `ddp_notebook`": (bare(DDPStrategy), 2, Net),
    "FSDP2 (ModelParallelStrategy), data-parallel": (model_parallel(2, 1), 2, Net),
    "FSDP2, hybrid-sharded": (model_parallel(4, 1), 4, Net),
    "FSDP2 with tensor parallelism": (model_parallel(2, 2), 4, Net),
    "FSDP1 (FSDPStrategy)": (bare(FSDPStrategy), 2, Net),
    "DeepSpeed": (bare(DeepSpeedStrategy), 2, Net),
    "XLA": (bare(XLAStrategy), 2, Net),
}
"""Strategy, ranks and model of each row; whole runs of them are in test_ddp.py and test_sharded.py."""


def test_the_strategies_of_the_table_are_those_of_the_code():
    assert list(STRATEGIES) == list(SETTINGS)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_probe_that_auto_takes(name, accumulation):
    strategy, world_size, model = SETTINGS[name]
    # `callbacks` for a schedule of accumulation
    trainer = SimpleNamespace(
        strategy=strategy,
        world_size=world_size,
        optimizers=[],
        callbacks=[],
        accumulate_grad_batches=accumulation,
        num_training_batches=100,
    )
    word = STRATEGIES[name][accumulation - 1].strip("`")
    lightning_module = model().train()

    def choose() -> str:
        probe = choose_probe("auto", trainer, lightning_module, accumulation)
        PROBES[probe]().require_readable(trainer, lightning_module, wrapped=False)
        return probe

    if word == "nothing":
        with pytest.raises(ValueError, match=r"(use|set) .*(`strategy='ddp'`|`ModelParallelStrategy\(data_parallel_s)"):
            choose()
    else:
        assert choose() == word
