"""What several tests of weight normalization look at."""

import pytest

from lightning_wn.weight_norm.parametrization import WeightNorm


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
