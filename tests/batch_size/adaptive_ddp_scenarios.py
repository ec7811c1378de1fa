"""Two ranks on the CPU: ``python adaptive_ddp_scenarios.py FOLDER STRATEGY``; results go to FOLDER/rank<r>.json."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from adaptive_runs import Factors, Model, batches_in_order, starts_of, train_by_hand, windows_of
from frozen_digits import QUIET, digits
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

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
    windows = [windows_of(epoch) for epoch in epochs]
    rates = [[float(epoch[start]) for start in starts_of(epoch)] for epoch in epochs]
    reference = Model("momentum")
    pairs = list(zip(*[DataLoader(torch.utils.data.Subset(data, range(r, 330, 2)), 16) for r in (0, 1)], strict=True))

    def loss(model, pair):
        return sum(nn.functional.cross_entropy(model(x), y) for x, y in pair) / 2

    train_by_hand(reference, pairs, windows, rates, loss=loss)
    found, expected = (nn.utils.parameters_to_vector(m.parameters()) for m in (model, reference))
    rejected = {reason.name: count for reason, count in measured._measurements[0].metric.rejected.items()}
    return {"epochs": epochs, "error": float((found - expected).abs().max().detach()), "rejected": rejected}


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
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def comes_home(strategy):
    """From worker processes that Lightning forks."""
    adaptive = AdaptiveBatchSizeCallback(schedule={0: 1, 3: 4})
    two_ranks([adaptive], batches_in_order(), strategy, max_epochs=1)
    return {"factor": adaptive.accumulate_grad_batches, "rate": adaptive.learning_rate_factor}


def main(folder: str, strategy: str) -> None:
    warnings.filterwarnings("ignore")
    results = {"home": comes_home(strategy)} if strategy != "ddp" else {"noise": noise_scale(), "examples": examples()}
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
