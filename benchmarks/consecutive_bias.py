"""How far the consecutive probe is off while a network trains: beside exact accumulation, in the same run.

Both callbacks watch the same optimizer steps: ``micro_batch`` reads the two accumulated micro-batches, and
``consecutive`` compares each step's gradient with the last one's. Run it with
``python benchmarks/consecutive_bias.py`` where lightning_wn is installed.
"""

from __future__ import annotations

import logging
import statistics
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn import GradientNoiseScaleCallback


class Digits(L.LightningModule):
    """MLP 64-64-10 with or without batch norm."""

    def __init__(self, optimizer: str, lr: float, *, batch_norm: bool) -> None:
        super().__init__()
        self.optimizer, self.lr = optimizer, lr
        norm = [nn.BatchNorm1d(64)] if batch_norm else []
        self.net = nn.Sequential(nn.Linear(64, 64), *norm, nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=self.lr)


def ratio(optimizer: str, lr: float, seed: int, *, batch_norm: bool) -> float:
    """Noise scale of ``consecutive`` over that of ``micro_batch``, over steps 50 to 300 of a run."""
    L.seed_everything(seed, verbose=False)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    settings = {"every_n_steps": 1, "ema_decay": 1.0}
    exact = GradientNoiseScaleCallback("micro_batch", prefix="exact", **settings)
    near = GradientNoiseScaleCallback("consecutive", prefix="near", **settings)

    class SkipTheStart(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
            if trainer.global_step == 50:
                exact._measurements.synchronize(across_ranks=False)
                near._measurements.synchronize(across_ranks=False)
                exact.reset()
                near.reset()

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=300,
        accumulate_grad_batches=2,
        callbacks=[SkipTheStart(), exact, near],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(optimizer, lr, batch_norm=batch_norm), DataLoader(data, 16, shuffle=True, drop_last=True))
    return near.estimate().noise_scale / exact.estimate().noise_scale


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("consecutive / exact noise scale, batch size 32: median (least to most) of 8 seeds")
    for batch_norm in (False, True):
        for optimizer, lr in (("SGD", 0.01), ("SGD", 0.1), ("SGD", 0.4), ("Adam", 1e-3), ("Adam", 1e-2)):
            ratios = [ratio(optimizer, lr, seed, batch_norm=batch_norm) for seed in range(8)]
            name = f"{optimizer} {lr:g}, {'batch norm' if batch_norm else 'no batch norm'}"
            print(f"  {name:26} {statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
