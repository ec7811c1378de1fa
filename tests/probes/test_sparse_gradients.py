"""Sparse gradients that no layer announces: refused in a sentence by every probe, measured at fixed weights."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback, measure_noise_scale
from lightning_wn.per_example import PerExampleNorms

TOKENS = 200


class LookUp(L.LightningModule):
    """A table whose gradient is sparse, the largest parameter or one among others, and dense layers."""

    def __init__(self, width: int, *, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Parameter(torch.randn(3))
        self.table = nn.Parameter(torch.randn(TOKENS, width))
        self.head = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 64))
        self.sparse = sparse

    def forward(self, tokens: Tensor) -> Tensor:
        rows = nn.functional.embedding(tokens, self.table, sparse=self.sparse)
        return self.head(rows).square().mean((1, 2)) + self.before.sum()

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        return self(tokens).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SparseWeight(LookUp):
    """A Parameter that is sparse itself."""

    def __init__(self, width: int) -> None:
        super().__init__(width, sparse=False)
        del self.table
        self.table = nn.Parameter(torch.eye(width, TOKENS).to_sparse())

    def forward(self, tokens: Tensor) -> Tensor:
        counts = nn.functional.one_hot(tokens, TOKENS).sum(1).float()
        rows = torch.sparse.mm(self.table, counts.T).T
        return self.head(rows).square().mean(1) + self.before.sum()


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(torch.randint(0, TOKENS, (64, 3), generator=generator), 8)


@pytest.mark.parametrize("model", [LookUp, SparseWeight])
@pytest.mark.parametrize("width", [4, 100], ids=["one of many", "the largest"])
@pytest.mark.parametrize("probe", ["micro_batch", "per_example", "batch_pair", "consecutive"])
def test_every_probe_refuses_them_in_a_sentence(probe, width, model):
    accumulate = 2 if probe == "micro_batch" else 1
    callback = GradientNoiseScaleCallback(probe, every_n_steps=1)
    trainer = L.Trainer(callbacks=[callback], max_steps=4, accumulate_grad_batches=accumulate, **QUIET)
    shape = rf"\({TOKENS}, {width}\)" if model is LookUp else rf"\({width}, {TOKENS}\)"
    with pytest.raises(ValueError, match=rf"sparse_coo gradient of a parameter of shape {shape}; .*`sparse=False`"):
        trainer.fit(model(width), batches())


@pytest.mark.parametrize("model", [LookUp, SparseWeight])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_by_default_they_end_no_run(accumulate, model):
    callback = GradientNoiseScaleCallback(every_n_steps=1)
    trainer = L.Trainer(callbacks=[callback], max_steps=4, accumulate_grad_batches=accumulate, **QUIET)
    with pytest.warns(UserWarning, match=r"sparse_coo gradient of a parameter of shape .*`sparse=False`"):
        trainer.fit(model(4), batches())
    assert trainer.global_step == 4
    assert callback.estimate().num_measurements == 0


@pytest.mark.parametrize("curvature", [False, True])
def test_at_fixed_weights_they_are_measured(curvature):
    estimates = [
        measure_noise_scale(LookUp(4, sparse=sparse), batches(), max_batches=16, curvature=curvature)
        for sparse in (False, True)
    ]
    assert estimates[0].noise_scale > 0.0
    assert estimates[1].noise_scale == pytest.approx(estimates[0].noise_scale, rel=1e-5)


def test_per_example_norms_measure_them():
    found = []
    for sparse in (False, True):
        model = LookUp(4, sparse=sparse)
        norms = PerExampleNorms(model, list(model.parameters()))
        norms.attach()
        for tokens in torch.tensor([[[1, 1, 4], [0, 2, 1]]] * 2):
            norms.before_forward(2)
            loss = model(tokens).mean()
            norms.before_backward(loss)
            loss.backward()
            found.append(norms.after_backward())
    torch.testing.assert_close(found[2:], found[:2])
