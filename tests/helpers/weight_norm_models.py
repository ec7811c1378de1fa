"""Small models for the tests of weight normalization."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn.weight_norm.core.normalized_module import weight_norm_of


class Regression(pl.LightningModule):
    """A small network on random data; `lr` lets the learning-rate finder in."""

    def __init__(self, net=None, lr=0.05):
        super().__init__()
        self.net = net if net is not None else nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.lr = lr
        self.batch_size = 8
        self.losses = []

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def data(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 4, generator=generator)
        y = torch.stack([x.sum(1), x.prod(1)], 1)
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = data


class Recurrent(Regression):
    """Reads the inputs as a sequence of numbers."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.ModuleDict({"lstm": nn.LSTM(1, 6, batch_first=True), "head": nn.Linear(6, 2)}))

    def loss(self, batch):
        return nn.functional.mse_loss(self.predict_step(batch, 0), batch[1])

    def predict_step(self, batch, batch_idx):
        return self.net["head"](self.net["lstm"](batch[0].unsqueeze(-1))[0][:, -1])


def quiet_trainer(*callbacks, **kwargs):
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(options | kwargs))


def normalized(model):
    return [name for name, module in model.named_modules() if weight_norm_of(module)]


def fit(model, *callbacks, **kwargs):
    trainer = quiet_trainer(*callbacks, **kwargs)
    trainer.fit(model)
    return trainer


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    return model
