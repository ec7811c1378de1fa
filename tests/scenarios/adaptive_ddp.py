"""Two ranks on the CPU: ``python adaptive_ddp.py FOLDER STRATEGY``; results go to FOLDER/rank<r>.json."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from helpers.adaptive_runs import Factors, Model, starts_of, train_by_hand, windows_of
from helpers.frozen_digits import QUIET, digits
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from lightning_wn import AdaptiveBatchSizeCallback, GradientNoiseScaleCallback


def two_ranks(callbacks, data, strategy=None, **settings):
    model, factors = Model("momentum"), Factors()
    strategy = strategy or DDPStrategy(process_group_backend="gloo")
    settings = QUIET | {"max_epochs": 4, "precision": "64-true", "log_every_n_steps": 2} | settings
    trainer = L.Trainer(callbacks=[*callbacks, factors], strategy=strategy, devices=2, **settings)
    trainer.fit(model, data)
    return model, factors.epochs


def noise_scale():
    """Rank r has every second example; by hand a micro-batch is both ranks' together."""
    data = digits(330, torch.float64)
    sampler = DistributedSampler(data, 2, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    adaptive = AdaptiveBatchSizeCallback(6.0, every_n_steps=3, learning_rate="linear")
    measured = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=0.9)
    model, epochs = two_ranks([adaptive, measured], DataLoader(data, 16, sampler=sampler))
    rejected = {reason.name: count for reason, count in measured._measurements[0].metric.rejected.items()}
    return {"epochs": epochs, "error": error_of(model, epochs), "rejected": rejected}


def pairs():
    """Both ranks' micro-batches, side by side."""
    data = digits(330, torch.float64)
    return list(zip(*[DataLoader(Subset(data, range(r, 330, 2)), 16) for r in (0, 1)], strict=True))


def error_of(model, epochs):
    """How far the weights are from those of the same training by hand, with the learning rate times the factor."""
    windows = [windows_of(epoch) for epoch in epochs]
    rates = [[float(epoch[start]) for start in starts_of(epoch)] for epoch in epochs]
    reference = Model("momentum")

    def loss(model, pair):
        return sum(nn.functional.cross_entropy(model(x), y) for x, y in pair) / 2

    train_by_hand(reference, pairs(), windows, rates, loss=loss)
    found, expected = (nn.utils.parameters_to_vector(m.parameters()) for m in (model, reference))
    return float((found - expected).abs().max().detach())


def examples():
    """Rank 0 has batches of 16, rank 1 of 8: together 24."""

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    data = digits(160, torch.float64)
    batches = list(DataLoader(data, 16))
    if rank:
        batches = [[tensor[:8] for tensor in batch] for batch in batches]
    adaptive = AdaptiveBatchSizeCallback(schedule={72: 2, 240: 4}, schedule_by="examples")
    _, epochs = two_ranks([adaptive], _Own(batches), max_epochs=2)
    return {"epochs": epochs, "counted": adaptive.state_dict()["counted"]}


class _Own:
    """Batches of this rank's own."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class _OfRank(_Own):
    """From pairs; a worker process finds out late which rank it is, and Lightning would shuffle a DataLoader there."""

    def __iter__(self):
        return iter([batch[torch.distributed.get_rank()] for batch in self.batches])


class Written(Factors):
    """Factors for the parent of worker processes, in a file."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.global_rank == 0:
            self.path.write_text(json.dumps(self.epochs))


def worker_processes(strategy, folder):
    """Worker processes that Lightning spawns or forks: two epochs, and from a checkpoint two more where it forks."""
    written = Path(folder, "factors.json")
    epochs, said = [], []
    fits = [(None, 2), (Path(folder, "half.ckpt"), 4)]
    # a spawned process takes seconds to import what it needs
    for ckpt_path, max_epochs in fits[: 1 if strategy == "ddp_spawn" else 2]:
        measured = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=0.9)
        adaptive = AdaptiveBatchSizeCallback(6.0, every_n_steps=3, learning_rate="linear")
        callbacks = [measured, adaptive, Written(written), Saver(Path(folder, "half.ckpt"))]
        model = Model("momentum")
        settings = QUIET | {"precision": "64-true", "log_every_n_steps": 2, "max_epochs": max_epochs}
        trainer = L.Trainer(callbacks=callbacks, strategy=strategy, devices=2, **settings)
        trainer.fit(model, _OfRank(pairs()), ckpt_path=ckpt_path)
        epochs += json.loads(written.read_text())
        said.append(
            {
                "factor": adaptive.accumulate_grad_batches,
                "rate": adaptive.learning_rate_factor,
                "state": adaptive.state_dict(),
                "trainers": trainer.accumulate_grad_batches,
                "measured": measured.estimate().num_measurements,
            }
        )
    saved = torch.load(Path(folder, "half.ckpt"), weights_only=True)["callbacks"][adaptive.state_key]
    return {"epochs": epochs, "said": said, "saved": saved, "error": error_of(model, epochs)}


class Saver(L.Callback):
    """Saves a checkpoint after the second epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def main(folder: str, strategy: str) -> None:
    warnings.filterwarnings("ignore")
    if strategy == "ddp":
        results = {"noise": noise_scale(), "examples": examples()}
    else:
        results = {"workers": worker_processes(strategy, folder)}
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
