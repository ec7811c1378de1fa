"""Layers that are built after `__init__` are normalized or refused, never left plain in silence."""

from contextlib import contextmanager

import pytest
import torch
from helpers.weight_norm_models import Regression, fit, normalized
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import apply_weight_norm


class BuiltIn(Regression):
    """Builds its layers in the hook of this name."""

    where = "configure_model"

    def __init__(self):
        super().__init__(nn.Identity())
        self.calls = 0

    def build(self):
        self.calls += 1
        if isinstance(self.net, nn.Identity):
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


class BuiltInConfigureModel(BuiltIn):
    def configure_model(self):
        self.build()


class BuiltInSetup(BuiltIn):
    def setup(self, stage):
        self.build()


class NormalizedInSetup(BuiltIn):
    def setup(self, stage):
        self.build()
        apply_weight_norm(self)


class PartlyBuiltInSetup(Regression):
    def setup(self, stage):
        self.extra = nn.Linear(2, 2)

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.extra(self.net(x)), y)


class BuiltInOnFitStart(PartlyBuiltInSetup):
    def setup(self, stage):
        pass

    def on_fit_start(self):
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("modules", [None, "net.*"])
def test_layers_built_in_configure_model_are_normalized(modules):
    model = BuiltInConfigureModel()
    trainer = fit(model, WeightNormCallback(modules))
    assert normalized(model) == ["net.0", "net.2"]
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert model.calls == 2  # once by the callback, once by Lightning


def test_configure_model_runs_in_the_trainers_contexts():
    opened = []

    @contextmanager
    def recorded(name, context):
        opened.append(name)
        with context:
            yield
        opened.pop()

    class Strategy(SingleDeviceStrategy):
        def model_sharded_context(self):
            return recorded("sharded", super().model_sharded_context())

        def tensor_init_context(self, empty_init=None):
            return recorded("tensor", super().tensor_init_context(empty_init))

    class Precision(HalfPrecision):
        def module_init_context(self):
            return recorded("module", super().module_init_context())

    class Halved(BuiltInConfigureModel):
        def loss(self, batch):
            return super().loss([t.to(torch.bfloat16) for t in batch])

        def build(self):
            super().build()
            self.seen = [*getattr(self, "seen", []), (*opened, torch.get_default_dtype())]

    model = Halved()
    fit(model, WeightNormCallback(), strategy=Strategy("cpu"), plugins=[Precision("bf16-true")])
    # once called by the callback, once by Lightning
    assert model.seen == [("tensor", "sharded", "module", torch.bfloat16)] * 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("modules", [None, "net.*"])
def test_layers_built_in_setup_are_refused_with_the_fix(modules):
    with pytest.raises(ValueError, match="would train without weight normalization") as error:
        fit(BuiltInSetup(), WeightNormCallback(modules))
    for word in ("'net.0' (Linear)", "'net.2' (Linear)", "configure_model", "apply_weight_norm(self)"):
        assert word in str(error.value)


@pytest.mark.parametrize("kind", [PartlyBuiltInSetup, BuiltInOnFitStart])
def test_one_late_layer_is_enough_to_refuse(kind):
    with pytest.raises(ValueError, match=r"'extra' \(Linear\) would train without") as error:
        fit(kind(), WeightNormCallback())
    assert "net.0" not in str(error.value)


def test_an_excluded_late_layer_is_legal():
    class Split(PartlyBuiltInSetup):
        pass

    model = Split()
    fit(model, WeightNormCallback(exclude="extra"))
    assert normalized(model) == ["net.0", "net.2"]


def test_setup_may_normalize_its_layers_itself():
    model = NormalizedInSetup()
    fit(model, WeightNormCallback())
    assert normalized(model) == ["net.0", "net.2"]
