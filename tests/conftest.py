"""Settings and fixtures for all tests."""

import pytest
import torch

from lightning_wn.weight_norm.core.parametrization import WeightNorm

# small tensors: a second thread costs more than it gives, and distributed tests use both cores
torch.set_num_threads(1)


@pytest.fixture
def computed(monkeypatch):
    """Counts how often a weight is computed."""
    calls = []
    forward = WeightNorm.forward

    def counted(self, g, v):
        calls.append(self)
        return forward(self, g, v)

    monkeypatch.setattr(WeightNorm, "forward", counted)
    return calls
