"""Train under a strategy of several processes and save what the calling process holds afterwards.

Run as a script: ``python weight_norm_processes.py STRATEGY FOLDER [recurrent]``.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from helpers.weight_norm_models import Recurrent, Regression, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.core.normalized_module import has_plain_weight, normalized_weights


def build():
    pl.seed_everything(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    nn.init.zeros_(net[4].weight)
    return Regression(net)


def recurrent(strategy, folder):
    """Bring the weights of several kinds of layers home, with the means folded into biases."""
    model = Recurrent()
    apply_weight_norm(model, "net.head")
    saver = ModelCheckpoint(folder / strategy, save_last=True)
    options = {"strategy": strategy, "devices": 2, "max_epochs": 3, "enable_checkpointing": True}
    callback = WeightNormCallback("net.*", init="data", mean_only_batch_norm=True)
    quiet_trainer(callback, saver, **options).fit(model)
    home = {name: normalized_weights(module) for name, module in model.net.items()}
    fold_weight_norm(model)
    last = torch.load(folder / strategy / "last.ckpt", weights_only=True)["state_dict"]
    results = {
        "normalized": [name for name, chains in home.items() if chains],
        "home": model.state_dict(),
        "last": last,
        "outputs": [model.eval().predict_step(batch, 0).detach() for batch in model.data()],
        "means": [name for name, _ in model.named_modules() if name.endswith("mean_only_batch_norm")],
    }
    torch.save(results, folder / f"{strategy}.pt")


def main(strategy, folder):
    model = build()
    checkpoint = ModelCheckpoint(folder / strategy, save_last=True, monitor="val_loss")
    trainer = quiet_trainer(
        WeightNormCallback(),
        checkpoint,
        strategy=strategy,
        devices=2,
        max_epochs=3,
        enable_checkpointing=True,
    )
    trainer.fit(model)
    plain = [has_plain_weight(model.net[i]) for i in (0, 2, 4)]
    fold_weight_norm(model)
    results = {
        "plain": plain,
        "tied": model.net[0].weight is model.net[2].weight,
        "weights": {name: p.detach().clone() for name, p in model.state_dict().items()},
        "last": checkpoint.last_model_path or str(folder / strategy / "last.ckpt"),
    }
    if strategy == "ddp_fork":
        # workers that load the file of g and v into the plain model
        results["tested"] = trainer.test(model, ckpt_path="best", verbose=False)
    if trainer.global_rank == 0:
        torch.save(results, folder / f"{strategy}.pt")


if __name__ == "__main__":
    run = recurrent if "recurrent" in sys.argv else main
    run(sys.argv[1], Path(sys.argv[2]))
