"""FSDP2 on two ranks on the CPU: ``python adaptive_sharded.py FOLDER [NAME ...]``.

Every scenario returns what JSON can hold; each rank writes its results to FOLDER/rank<r>.json.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from helpers.adaptive_runs import Factors, Model, starts_of, train_by_hand, windows_of
from helpers.frozen_digits import QUIET, digits
from helpers.processes import write_scenarios
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler, Subset

from lightning_wn import AdaptiveBatchSizeCallback, GradientNoiseScaleCallback

EXAMPLES = 330


class Sharded(Model):
    """The digits MLP in float64, layer by layer under FSDP2."""

    def configure_model(self):
        if isinstance(self.net, FSDPModule):
            return
        for module in (self.net[0], self.net[2], self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


def fit(callbacks, model, ckpt_path=None, **settings):
    """Rank r has every second example: 11 micro-batches an epoch, the last one of 5."""
    factors = Factors()
    data = digits(EXAMPLES, torch.float64)
    sampler = DistributedSampler(data, 2, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=settings.pop("save_distributed_checkpoint", True),
    )
    settings = QUIET | {"max_epochs": 4, "log_every_n_steps": 2} | settings
    trainer = L.Trainer(callbacks=[*callbacks, factors], strategy=strategy, devices=2, **settings)
    trainer.fit(model, DataLoader(data, 16, sampler=sampler), ckpt_path=ckpt_path)
    return trainer, factors.epochs


def by_hand(model, epochs, rate, **settings):
    """The same steps on one process, of both ranks' micro-batches together."""
    data = digits(EXAMPLES, torch.float64)
    pairs = list(zip(*[DataLoader(Subset(data, range(r, EXAMPLES, 2)), 16) for r in (0, 1)], strict=True))
    windows = [windows_of(epoch) for epoch in epochs]
    rates = [[rate(epoch[start]) for start in starts_of(epoch)] for epoch in epochs]

    def loss(model, pair):
        return sum(nn.functional.cross_entropy(model(x), y) for x, y in pair) / 2

    train_by_hand(model, pairs, windows, rates, loss=loss, **settings)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def whole(model):
    return torch.cat([p.detach().full_tensor().flatten() for p in model.parameters()])


def distance(model, reference):
    return float((whole(model) - reference).abs().max())


def schedule(folder):
    """Short last windows, clipping, a scheduler, and the root of the ratio on the learning rate."""
    found = {}
    for optimizer in ("momentum", "adam"):
        adaptive = AdaptiveBatchSizeCallback(schedule={0: 1, 2: 2, 4: 4, 6: 3, 10: 1, 21: 5})
        model = Sharded(optimizer, "exponential")
        trainer, epochs = fit([adaptive], model, gradient_clip_val=0.3)
        reference = by_hand(
            Model(optimizer, "exponential"),
            epochs,
            lambda factor: factor**0.5,
            clip=0.3,
            steps_per_window=lambda batches: batches,
        )
        found[optimizer] = {
            "windows": [windows_of(epoch) for epoch in epochs],
            "distance": distance(model, reference),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        }
    return found


def noise_scale(folder):
    """The noise-scale callback on either side."""
    found = []
    for first in (True, False):
        adaptive = AdaptiveBatchSizeCallback(6.0, every_n_steps=3, learning_rate="linear")
        measured = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=0.9)
        model = Sharded("momentum")
        _, epochs = fit([adaptive, measured] if first else [measured, adaptive], model)
        rejected = {reason.name: count for reason, count in measured._measurements[0].metric.rejected.items()}
        estimate = measured.estimate()
        found.append(
            {
                "epochs": epochs,
                "distance": distance(model, by_hand(Model("momentum"), epochs, float)),
                "rejected": rejected,
                "measured": estimate.num_measurements,
                "noise_scale": estimate.noise_scale,
                "probe": estimate.probe,
                "factor": adaptive.accumulate_grad_batches,
            }
        )
    return found


def examples(folder):
    adaptive = AdaptiveBatchSizeCallback(schedule={96: 2, 660: 4}, schedule_by="examples")
    _, epochs = fit([adaptive], Sharded(), max_epochs=3)
    return {"epochs": epochs, "counted": adaptive.state_dict()["counted"]}


def resume(folder):
    """Killed after two epochs of four, with both kinds of checkpoint."""

    class Saver(L.Callback):
        def __init__(self, path):
            self.path = path

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(self.path)

    found = {}
    for kind, distributed in (("sharded", True), ("whole", False)):
        path = Path(folder, f"{kind}.ckpt")

        def run(others=(), ckpt_path=None, save_distributed_checkpoint=distributed, **settings):
            adaptive = AdaptiveBatchSizeCallback(6.0, every_n_steps=3)
            measured = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=0.9)
            model = Sharded("adam", "exponential")
            _, epochs = fit(
                [measured, adaptive, *others],
                model,
                ckpt_path,
                save_distributed_checkpoint=save_distributed_checkpoint,
                **settings,
            )
            return whole(model), epochs, adaptive.state_dict(), measured.estimate().noise_scale

        straight = run()
        run([Saver(path)], max_epochs=2)
        resumed = run(ckpt_path=path)
        found[kind] = {
            "same weights": bool(torch.equal(straight[0], resumed[0])),
            "same factors": straight[1][2:] == resumed[1],
            "same state": straight[2] == resumed[2],
            "noise scales": [straight[3], resumed[3]],
            "epochs": straight[1],
        }
    return found


def held_back(folder):
    """Gradients accumulate unreduced, and are reduced at the end of every window."""

    class HeldBack(Sharded):
        def training_step(self, batch, batch_idx):
            last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
            self.net.set_requires_gradient_sync(last)
            return super().training_step(batch, batch_idx)

    adaptive = AdaptiveBatchSizeCallback(schedule={0: 1, 2: 2, 4: 4, 6: 3}, learning_rate="linear")
    measured = GradientNoiseScaleCallback(every_n_steps=1)
    model = HeldBack()
    _, epochs = fit([adaptive, measured], model, max_epochs=2)
    return {
        "windows": [windows_of(epoch) for epoch in epochs],
        "distance": distance(model, by_hand(Model(), epochs, float)),
        "measured": measured.estimate().num_measurements,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    folder, *names = sys.argv[1:]
    write_scenarios([schedule, noise_scale, held_back, examples, resume], folder, names)
