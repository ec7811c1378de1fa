"""The numbers that are logged, against the definition."""

import pytest
import torch
from helpers.weight_norm_models import Regression, fit, quiet_trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_wn import WeightNormCallback
from lightning_wn.callbacks.weight_norm.signals import learning_signals, mean_norms
from lightning_wn.weight_norm import apply_weight_norm

KEYS = {"effective_lr_median", "effective_lr_min", "effective_lr_max", "g_mean", "g_std", "g_min", "g_max", "v_growth"}


def test_signals_are_what_they_say():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ConvTranspose1d(3, 2, 2))
    apply_weight_norm(model)
    start = mean_norms(model)
    parameters = [[getattr(m.parametrizations.weight, f"original{i}") for m in model] for i in range(2)]
    with torch.no_grad():
        for v in parameters[1]:
            v.mul_(3)
    groups = [{"params": [parameters[1][0]], "lr": 0.1}, {"params": [parameters[1][1]], "lr": 0.01}]
    signals = learning_signals(model, [torch.optim.SGD(groups)], start, per_layer=True)
    norms = [parameters[1][0].norm(dim=1), parameters[1][1].norm(dim=(0, 2))]
    rates = torch.cat([0.1 / norms[0] ** 2, 0.01 / norms[1] ** 2])
    g = torch.cat([p.flatten() for p in parameters[0]])
    expected = {
        "effective_lr_median": rates.median(),
        "effective_lr_min": rates.min(),
        "effective_lr_max": rates.max(),
        "g_mean": g.mean(),
        "g_std": g.std(unbiased=False),
        "g_min": g.min(),
        "g_max": g.max(),
        "v_growth": 3.0,
    }
    assert expected.keys() == KEYS
    for key, value in expected.items():
        assert signals[key] == pytest.approx(float(value), rel=1e-5)
    assert signals["effective_lr_max/0.weight"] == pytest.approx(float((0.1 / norms[0] ** 2).max()), rel=1e-5)
    assert set(signals) == KEYS | {f"{key}/{i}.weight" for key in KEYS for i in range(2)}
    assert "effective_lr_max" not in learning_signals(model, [], start)


@pytest.mark.parametrize("how", [True, "layers"])
def test_signals_are_logged_at_log_steps(tmp_path, how):
    model = Regression()
    trainer = fit(model, WeightNormCallback(log_signals=how), logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.logger.save()
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert {f"weight_norm/{key}" for key in KEYS} <= set(header)
    assert ("weight_norm/g_mean/net.0.weight" in header) == (how == "layers")
    growth = [line.split(",")[header.index("weight_norm/v_growth")] for line in lines[1:]]
    steps = [line.split(",")[header.index("step")] for line, value in zip(lines[1:], growth, strict=True) if value]
    assert steps == ["1", "3"]
    assert trainer.callback_metrics["weight_norm/v_growth"] > 1  # under SGD it only grows


def test_growth_goes_on_from_a_checkpoint(tmp_path):
    first = fit(Regression(), WeightNormCallback(log_signals=True), log_every_n_steps=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer = quiet_trainer(WeightNormCallback(log_signals=True), max_epochs=2, log_every_n_steps=1)
    trainer.fit(Regression(), ckpt_path=tmp_path / "half.ckpt")
    growth = [t.callback_metrics["weight_norm/v_growth"] for t in (first, trainer)]
    assert 1 < growth[0] < growth[1]
