"""DDP in several processes: what the workers train comes home."""

import pytest
import torch
from helpers.processes import SCENARIOS, run_script
from helpers.weight_norm_models import Recurrent, Regression, quiet_trainer
from torch import nn

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import apply_weight_norm

SCRIPT = SCENARIOS / "weight_norm_processes.py"


def run(folder, strategy, *arguments):
    run_script(SCRIPT, strategy, str(folder), *arguments, ranks=2 if strategy == "ddp" else None)
    return torch.load(folder / f"{strategy}.pt", weights_only=True)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """A run under ordinary DDP, where the first rank is the calling process."""
    return run(tmp_path_factory.mktemp("ddp"), "ddp")


def from_checkpoint(path):
    """The weights of a file, which are plain."""
    return {k: v.double() for k, v in torch.load(path, weights_only=True)["state_dict"].items()}


def test_ordinary_ddp_trains_normalized_layers(ordinary):
    assert ordinary["plain"] == [False, False, False]
    assert ordinary["tied"]
    trained = from_checkpoint(ordinary["last"])
    assert trained["net.4.weight"].abs().sum() > 0  # started at zero
    for name, weight in ordinary["weights"].items():
        assert torch.equal(weight.double(), trained[name])


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_trained_weights_come_home(ordinary, tmp_path, strategy):
    home = run(tmp_path, strategy)
    assert home["plain"] == [True, True, True]
    assert home["tied"]
    trained = from_checkpoint(home["last"])
    assert home["weights"].keys() == trained.keys() == ordinary["weights"].keys()
    for name, weight in home["weights"].items():
        assert torch.equal(weight.double(), trained[name])
        # and, bit for bit, what ordinary DDP trains from the same seed
        assert torch.equal(weight, ordinary["weights"][name])
    if strategy == "ddp_fork":
        assert home["tested"][0]["test_loss"] > 0


def test_recurrent_weights_and_running_means_come_home(tmp_path):
    home = run(tmp_path, "ddp_spawn", "recurrent")
    assert home["normalized"] == ["head"]  # as it was before the fit
    assert home["means"] == []
    assert list(home["home"]) == list(home["last"])
    for name, tensor in home["last"].items():
        assert torch.equal(home["home"][name], tensor), name
    plain = Recurrent()
    assert not torch.equal(plain.net["lstm"].weight_hh_l0, home["home"]["net.lstm.weight_hh_l0"])
    plain.load_state_dict(home["last"])
    for batch, output in zip(plain.data(), home["outputs"], strict=True):
        assert torch.equal(plain.eval().predict_step(batch, 0), output)


def test_layers_normalized_before_the_fit_come_home_normalized():
    """A worker folds only what it rewrote: the parent of these layers is not plain."""
    model = Regression(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    apply_weight_norm(model, "net.0")
    callback = WeightNormCallback()
    trainer = quiet_trainer(callback, strategy="ddp_fork")
    trainer.strategy.connect(model)
    callback.setup(trainer, model, "fit")
    assert "net.1.parametrizations.weight.original0" in dict(model.named_parameters())
    callback.teardown(trainer, model, "fit")
    names = list(model.state_dict())
    assert "net.1.weight" in names
    assert "net.0.parametrizations.weight.original0" in names
