"""Where the batch is not in the first dimension, the callback can be told, and then measures exactly."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback

BATCH, LENGTH, WIDTH = 6, 5, 8


class SequenceFirst(L.LightningModule):
    """A transformer as torch builds it by default: (T, B, features) inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def training_step(self, batch, batch_idx):
        return self.encoder(batch.transpose(0, 1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(**arguments):
    model, own = SequenceFirst(), GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0, **arguments)
    data = torch.randn(4, BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    L.Trainer(callbacks=[own], **QUIET, max_epochs=1).fit(model, DataLoader(data, batch_size=None))
    return model, data, own.estimate()


def test_sequence_first():
    model, data, estimate = fit(probe="per_example", batch_dims={"encoder.*": 1})
    spread = 0.0
    for batch in data:
        rows = []
        for example in batch:
            loss = model.training_step(example[None], 0)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]).double())
        spread += float(torch.stack(rows).var(0).sum()) / len(data)
    assert estimate.num_measurements == len(data)
    # float32 gradients
    assert estimate.cov_trace == pytest.approx(spread, rel=1e-4)


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match=r"`batch_dims` names 'encodr.\*', which matches no module of Sequence"):
        fit(batch_dims={"encodr.*": 1})


@pytest.mark.parametrize("dim", [-1, 1.5, True, "fold"], ids=repr)
def test_a_dimension_that_is_none(dim):
    with pytest.raises(ValueError, match=r"`batch_dims\['encoder'\]` must be a dimension, 0 or more, or 'folded'"):
        GradientNoiseScaleCallback(batch_dims={"encoder": dim})
