"""How far the probes of whole batches are off while a network trains: beside exact accumulation, in the same run.

All callbacks watch the same optimizer steps: ``micro_batch`` reads the two accumulated micro-batches, ``consecutive``
compares each step's gradient with the last one's, and ``batch_pair`` with the next micro-batch's at the same weights. A
generative adversarial network steps by hand, batch by batch; there the gradients of the two halves of each
batch, by autograd at the weights of the step, stand for the accumulated micro-batches.

The rules: every optimizer step from the 50th to the 300th is measured, with the plain mean; the ratio of the noise
scales of one run is taken, and of eight seeds the median. ``batch_pair`` is to be within a factor of 1.3 of
accumulation everywhere.

Run it with ``python benchmarks/consecutive_bias.py`` where lightning_wn is installed.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn import GradientNoiseScale, GradientNoiseScaleCallback

FIRST, LAST, BATCH, SEEDS = 50, 300, 32, 8


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


class Adversaries(L.LightningModule):
    """A generator of digits and its critic, stepped in turn."""

    def __init__(self, optimizer: str, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer, self.lr = optimizer, lr
        self.generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def generator_loss(self, x: Tensor, z: Tensor) -> Tensor:
        return nn.functional.softplus(-self.critic(self.generator(z))).mean()

    def critic_loss(self, x: Tensor, z: Tensor) -> Tensor:
        fake = nn.functional.softplus(self.critic(self.generator(z).detach()))
        return (fake + nn.functional.softplus(-self.critic(x))).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer, loss in zip(self.optimizers(), (self.generator_loss, self.critic_loss), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(*batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        make = getattr(torch.optim, self.optimizer)
        return [make(net.parameters(), lr=self.lr) for net in (self.generator, self.critic)]


class Halves(L.Callback):
    """Reads the noise scale off the two halves of each batch, for each optimizer, at the weights of its step."""

    def __init__(self) -> None:
        self.metrics = [GradientNoiseScale(ema_decay=1.0), GradientNoiseScale(ema_decay=1.0)]
        self.batch: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, model: L.LightningModule, batch: list[Tensor], idx: int) -> None:
        self.batch = batch

    def on_before_optimizer_step(self, trainer: L.Trainer, model: Adversaries, optimizer: object) -> None:
        which = trainer.optimizers.index(optimizer)
        loss, net = ((model.generator_loss, model.generator), (model.critic_loss, model.critic))[which]
        halves = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(*half), list(net.parameters()))])
            for half in zip(*(part.chunk(2) for part in self.batch), strict=True)
        ]
        norms, mean = torch.stack([half.square().sum() for half in halves]), torch.stack(halves).mean(0)
        self.metrics[which].update(norms, [BATCH // 2, BATCH // 2], mean.square().sum())

    def reset(self) -> None:
        for metric in self.metrics:
            metric.reset()


class SkipTheStart(L.Callback):
    """Forgets what was measured before a batch."""

    def __init__(self, reset: Callable[[], None], batch: int) -> None:
        self.reset, self.batch, self.seen = reset, batch, 0

    def on_train_batch_start(self, *args: object) -> None:
        if self.seen == self.batch:
            self.reset()
        self.seen += 1


def data_of(*, noise: int = 0) -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32)
    return TensorDataset(x, torch.randn(len(x), noise) if noise else torch.tensor(y))


def fit(model: L.LightningModule, data: DataLoader, callbacks: list[L.Callback], **settings: object) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, data)


def probe(name: str) -> GradientNoiseScaleCallback:
    return GradientNoiseScaleCallback(name, prefix=name, every_n_steps=1, ema_decay=1.0)


def forget(*callbacks: GradientNoiseScaleCallback) -> None:
    for callback in callbacks:
        callback._measurements.synchronize(across_ranks=False)
        callback.reset()


def digit_ratios(optimizer: str, lr: float, seed: int, *, batch_norm: bool) -> list[tuple[float, float]]:
    """Noise scales of ``consecutive`` and ``batch_pair`` over that of ``micro_batch`` in one run."""
    L.seed_everything(seed, verbose=False)
    exact, near, pair = callbacks = [probe(name) for name in ("micro_batch", "consecutive", "batch_pair")]
    skip = SkipTheStart(lambda: forget(*callbacks), 2 * FIRST)
    data = DataLoader(data_of(), BATCH // 2, shuffle=True, drop_last=True)
    model = Digits(optimizer, lr, batch_norm=batch_norm)
    fit(model, data, [skip, *callbacks], max_steps=LAST, accumulate_grad_batches=2)
    truth = exact.estimate().noise_scale
    return [(near.estimate().noise_scale / truth, pair.estimate().noise_scale / truth)]


def gan_ratios(optimizer: str, lr: float, seed: int) -> list[tuple[float, float]]:
    """The same for the generator and the critic, over the noise scale of half batches."""
    L.seed_everything(seed, verbose=False)
    near, pair = callbacks = [probe("consecutive"), probe("batch_pair")]
    halves = Halves()
    skip = SkipTheStart(lambda: (forget(*callbacks), halves.reset()), FIRST)
    data = DataLoader(data_of(noise=16), BATCH, shuffle=True, drop_last=True)
    # both optimizers' steps count
    fit(Adversaries(optimizer, lr), data, [skip, halves, *callbacks], max_steps=2 * LAST)
    return [
        (
            near.estimate(index).noise_scale / float(metric.compute()["noise_scale"]),
            pair.estimate(index).noise_scale / float(metric.compute()["noise_scale"]),
        )
        for index, metric in enumerate(halves.metrics)
    ]


def say(name: str, ratios: list[tuple[float, float]]) -> None:
    columns = zip(*ratios, strict=True)
    cells = [f"{statistics.median(own):6.2f}  ({min(own):.2f} to {max(own):.2f})" for own in columns]
    print(f"  {name:30} {cells[0]:26} {cells[1]}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"noise scale over that of accumulation, batch size {BATCH}: median (least to most) of {SEEDS} seeds")
    print(f"  {'':30} {'consecutive':26} batch_pair")
    for batch_norm in (False, True):
        for optimizer, lr in (("SGD", 0.01), ("SGD", 0.1), ("SGD", 0.4), ("Adam", 1e-3), ("Adam", 1e-2)):
            runs = [digit_ratios(optimizer, lr, seed, batch_norm=batch_norm)[0] for seed in range(SEEDS)]
            say(f"{optimizer} {lr:g}, {'batch norm' if batch_norm else 'no batch norm'}", runs)
    for optimizer, lr in (("Adam", 1e-3), ("SGD", 0.1)):
        runs = [gan_ratios(optimizer, lr, seed) for seed in range(SEEDS)]
        for name, of_net in zip(("generator", "critic"), zip(*runs, strict=True), strict=True):
            say(f"{optimizer} {lr:g}, {name}", list(of_net))
