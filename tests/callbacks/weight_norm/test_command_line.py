"""The callback from the YAML file of a LightningCLI."""

import sys

import pytest
import yaml
from helpers.weight_norm_models import Regression
from lightning.pytorch.cli import LightningCLI

from lightning_wn.weight_norm.core.normalized_module import weight_norm_of


def run(tmp_path, init_args):
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning_wn.WeightNormCallback", "init_args": init_args},
            ],
        }
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = LightningCLI(
        Regression,
        args=["fit", "--config", str(path)],
        save_config_callback=None,
        seed_everything_default=False,
    )
    names = [name for name, module in cli.model.named_modules() if weight_norm_of(module)]
    return cli.parser.dump(cli.config, skip_none=False), names


@pytest.mark.parametrize(
    ("init_args", "names"),
    [
        ({}, ["net.0", "net.2"]),
        ({"modules": None, "exclude": []}, ["net.0", "net.2"]),
        ({"modules": ["net.*"], "exclude": ["net.2"]}, ["net.0"]),
        ({"modules": "net.*", "exclude": "*.0"}, ["net.2"]),
        ({"modules": "torch.nn.Linear"}, ["net.0", "net.2"]),
        ({"init": "data", "dim": "output"}, ["net.0", "net.2"]),
        ({"dim": None, "modules": "net.2"}, ["net.2"]),
        (
            {
                "init": "data",
                "mean_only_batch_norm": True,
                "mean_only_momentum": 0.2,
                "mean_only_synchronize": True,
            },
            ["net.0", "net.2"],
        ),
        ({"modules": ["torch.nn.Linear"], "exclude": "net.[01]"}, ["net.2"]),
        ({"checkpoint": "parametrized", "log_signals": "layers", "cache_evaluation": False}, ["net.0", "net.2"]),
        ({"checkpoint": "folded", "log_signals": True, "fold_on_fit_end": True}, []),
    ],
)
def test_the_callback_is_built_from_yaml(monkeypatch, tmp_path, init_args, names):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    written, found = run(tmp_path, yaml.safe_load(yaml.safe_dump(init_args)))
    assert found == names
    # what Lightning writes beside the logs can be read back
    again = yaml.safe_load(written)["fit"] if "fit" in yaml.safe_load(written) else yaml.safe_load(written)
    arguments = again["trainer"]["callbacks"][0]["init_args"]
    assert {key: arguments[key] for key in init_args} == init_args
