"""The data and the model of the examples: scikit-learn's handwritten digits and a small CNN."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_VALIDATION = 360


class Digits(pl.LightningDataModule):
    """1,797 images of 8 x 8 pixels, 10 classes; 1,437 to train on and 360 to validate. No download.

    Args:
        batch_size: Images in one micro-batch on one rank.
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        # pixels are 0 to 16
        x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        y = torch.tensor(labels)
        train, validation = train_test_split(
            torch.arange(len(y)), test_size=NUM_VALIDATION, stratify=labels, random_state=0
        )
        self.train_set = TensorDataset(x[train], y[train])
        self.validation_set = TensorDataset(x[validation], y[validation])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation_set, batch_size=NUM_VALIDATION)


class DigitsCNN(pl.LightningModule):
    """Three convolutions and a linear layer, without batch normalization.

    The loss is a mean over the images of a micro-batch: what the noise scale needs.

    Args:
        learning_rate: Step size of SGD with momentum.
    """

    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        # sync_dist: with several ranks, each has seen its share of the images
        self.log("val/loss", nn.functional.cross_entropy(logits, y), sync_dist=True)
        self.log("val/accuracy", (logits.argmax(dim=1) == y).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)
