"""Optimizers and weight-normalized layers hold the same parameters before the first step."""

import pytest
import torch
from helpers.weight_norm_models import Regression, fit, normalized
from torch import nn

from lightning_wn import WeightNormCallback, apply_weight_norm
from lightning_wn.callbacks.weight_norm.checks import require_in_optimizers
from lightning_wn.weight_norm.core.selection import NamedLayer


class EarlyOptimizer(Regression):
    def __init__(self):
        super().__init__()
        self.early = list(self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.early, lr=0.1)


class WeightsByName(Regression):
    def configure_optimizers(self):
        named = dict(self.named_parameters())
        decay = [p for n, p in named.items() if n.endswith(".weight")]
        rest = [p for n, p in named.items() if n.endswith(".bias")]
        return torch.optim.SGD([{"params": decay, "weight_decay": 0.1}, {"params": rest}], lr=0.1)


class TwoOptimizers(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


class LeavesOneOut(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)


class ForeignParameter(Regression):
    def configure_optimizers(self):
        self.scales = [nn.Parameter(torch.zeros(()))]
        return torch.optim.SGD([*self.parameters(), *self.scales], lr=0.1)


class NoOptimizer(Regression):
    def configure_optimizers(self):
        return None


def test_an_optimizer_of_replaced_weights_is_refused():
    with pytest.raises(ValueError, match="An optimizer holds the plain weight of") as error:
        fit(EarlyOptimizer(), WeightNormCallback())
    for word in ("'net.0' (Linear)", "'net.2' (Linear)", "inside `configure_optimizers`", "`__init__`"):
        assert word in str(error.value)


def test_groups_by_name_that_lose_g_and_v_are_refused():
    with pytest.raises(ValueError, match="No optimizer holds the trainable") as error:
        fit(WeightsByName(), WeightNormCallback())
    for word in ("g of 'net.0' (Linear)", "v of 'net.0' (Linear)", "parametrizations.weight", "`exclude`"):
        assert word in str(error.value)


def test_a_layer_in_no_optimizer_is_refused_until_excluded_or_frozen():
    with pytest.raises(ValueError, match=r"No optimizer holds the trainable g of 'net\.0'"):
        fit(LeavesOneOut(), WeightNormCallback())
    fit(LeavesOneOut(), WeightNormCallback(exclude="net.0"))
    model = LeavesOneOut()
    model.net[0].requires_grad_(False)
    fit(model, WeightNormCallback())
    assert not model.net[0].parametrizations.weight.original0.requires_grad


@pytest.mark.parametrize("kind", [TwoOptimizers, ForeignParameter])
def test_legal_optimizers_pass(kind):
    model = kind()
    fit(model, WeightNormCallback())
    assert normalized(model) == ["net.0", "net.2"]


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")
def test_a_fit_without_optimizer_passes():
    fit(NoOptimizer(), WeightNormCallback())


def test_an_optimizer_that_loses_a_recurrent_weight_is_refused():
    model = nn.ModuleDict({"layer": nn.LSTM(3, 4)})
    layer = NamedLayer(("layer",), model["layer"])
    early = torch.optim.SGD(model.parameters())
    apply_weight_norm(model, "layer")
    held = [p for name, p in model.named_parameters() if "weight_hh_l0" not in name]
    with pytest.raises(ValueError, match=r"trainable g of weight_hh_l0 of 'layer' \(LSTM\), v of weight_hh_l0"):
        require_in_optimizers([torch.optim.SGD(held)], [layer])
    with pytest.raises(ValueError, match=r"holds the plain weight of weight_ih_l0 of 'layer' \(LSTM\)"):
        require_in_optimizers([early], [layer])
