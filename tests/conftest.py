"""Settings and fixtures for all tests."""

import os
from pathlib import Path

import pytest

# small tensors: a second thread costs more than it gives, and distributed tests use both cores
os.environ["OMP_NUM_THREADS"] = "1"

TESTS = Path(__file__).parent
# they start processes of several ranks
DISTRIBUTED = {
    TESTS / "callbacks" / "adaptive_batch_size" / "test_ddp.py",
    TESTS / "callbacks" / "adaptive_batch_size" / "test_sharded.py",
    TESTS / "callbacks" / "noise_scale" / "test_ddp.py",
    TESTS / "callbacks" / "noise_scale" / "test_sharded.py",
    TESTS / "callbacks" / "weight_norm" / "test_processes.py",
    TESTS / "callbacks" / "weight_norm" / "test_sharded.py",
    TESTS / "critical_batch_size" / "test_processes.py",
    TESTS / "weight_norm" / "test_initialization_on_ranks.py",
}


def pytest_collection_modifyitems(items):
    """Mark tests by where they are. Files that start processes come first: a worker takes a file at a time."""
    for item in items:
        launched = getattr(item, "callspec", None) and item.callspec.params.get("column") in ("ddp", "sharded")
        if item.path in DISTRIBUTED or launched:
            item.add_marker("distributed")
        elif item.path.parent.name == "examples":
            item.add_marker("examples")
        if item.get_closest_marker("distributed") or item.get_closest_marker("examples"):
            item.add_marker("slow")
    items.sort(key=lambda item: (not item.get_closest_marker("distributed"), not item.get_closest_marker("slow")))


@pytest.fixture
def computed(monkeypatch):
    """Counts how often a weight is computed."""
    from lightning_wn.weight_norm.core.parametrization import WeightNorm

    calls = []
    forward = WeightNorm.forward

    def counted(self, g, v):
        calls.append(self)
        return forward(self, g, v)

    monkeypatch.setattr(WeightNorm, "forward", counted)
    return calls
