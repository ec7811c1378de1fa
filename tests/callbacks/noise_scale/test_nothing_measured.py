"""A run that ends without a measurement is told why; the advice is followed here, and then it measures."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback


def fit(model=None, *, probe="auto", every_n_steps=1, batch_size=16, batches=6, batch_size_fn=None, **settings):
    """Return what is said of nothing measured, and how many measurements there were."""
    own = GradientNoiseScaleCallback(probe, every_n_steps=every_n_steps, batch_size_fn=batch_size_fn)
    trainer = L.Trainer(callbacks=[own], **(QUIET | {"limit_train_batches": batches, "max_epochs": 1} | settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model or DigitsMLP(), DataLoader(digits(128), batch_size))
    said = [str(w.message) for w in caught if "measured nothing" in str(w.message)]
    return (said[0] if said else ""), own.estimate().num_measurements


class ByHand(DigitsMLP):
    """Manual optimization, by a closure that is run as often as the optimizer likes."""

    def __init__(self, way):
        super().__init__(lr=0.01)
        self.automatic_optimization = False
        self.way = way

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = super(ByHand, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        closure()
        if self.way == "twice":
            closure()
        if self.way == "past Lightning":
            optimizer.optimizer.step()
        else:
            optimizer.step()


def test_a_step_that_goes_past_lightning():
    said, count = fit(ByHand("past Lightning"), probe="micro_batch")
    assert "no optimizer step came by it; in manual optimization it hears of those that are made by `self." in said
    assert count == 0
    assert fit(ByHand("as advised"), probe="consecutive")[1] == 5


def test_no_turn():
    said, count = fit(probe="consecutive", every_n_steps=50, batches=1)
    assert "looked at 1 optimizer step, and found nothing to compare" in said
    assert count == 0
    assert fit(probe="consecutive", every_n_steps=50, batches=2)[1] == 1
    said, count = fit(probe="micro_batch", every_n_steps=1, accumulate_grad_batches=2, batches=1)
    assert "looked at 1 optimizer step, and each of them had a single gradient sample; let" in said
    assert fit(probe="micro_batch", every_n_steps=1, accumulate_grad_batches=2, batches=2) == ("", 1)


def test_one_example():
    said, count = fit(probe="per_example", batch_size=1)
    assert "could not read them: an optimizer step of one example has a single gradient sample" in said
    assert count == 0
    assert fit(batch_size=1, accumulate_grad_batches=2) == ("", 3)


def test_all_left_out():
    class Infinite(DigitsMLP):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.inf

    said, _ = fit(Infinite(), accumulate_grad_batches=2)
    assert "looked at 3 optimizer steps, and left them out: 3 had NaN or infinite gradients; a warning names" in said
    said, _ = fit(accumulate_grad_batches=2, batch_size_fn=lambda batch: 0)
    assert "looked at 3 optimizer steps, and left them out: 3 had a batch that counts no example; a" in said


def test_two_backward_passes_are_named():
    said, count = fit(ByHand("twice"), probe="per_example")
    assert (
        "gradients are zeroed after their backward pass and computed anew before the optimizer steps, as a clo" in said
    )
    assert count == 0
    assert fit(ByHand("twice"))[1] > 0


class TakesTurns(DigitsMLP):
    """Every other step leaves a layer out."""

    def __init__(self):
        super().__init__()
        self.turns = nn.ModuleList(nn.Linear(64, 10) for _ in range(2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x) + self.turns[batch_idx % 2](x), y)


def test_layers_that_take_turns():
    said, count = fit(TakesTurns(), probe="consecutive")
    assert "could not read them: layers take turns: two successive steps have gradients of other parameters" in said
    assert count == 0
    assert fit(TakesTurns(), probe="per_example")[1] == 6


class OwnSum(DigitsMLP):
    """A parameter that is used outside any module's forward, in a way that no example can be told by."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return (self.scale * super().training_step(batch, batch_idx)).exp()


def test_a_probe_that_cannot_read_the_run_is_followed_by_one_that_can():
    own = GradientNoiseScaleCallback(every_n_steps=1)
    trainer = L.Trainer(callbacks=[own], **QUIET, limit_train_batches=8, max_epochs=1)
    with pytest.warns(UserWarning, match="cannot measure with the probe 'per_example', and '.*' takes over: "):
        trainer.fit(OwnSum(), DataLoader(digits(128), 16))
    assert trainer.global_step == 8
    assert own.estimate().probe not in ("per_example", "micro_batch")
    assert own.estimate().num_measurements >= 6
    with pytest.raises(ValueError, match="`probe='per_example'`: "):
        L.Trainer(callbacks=[GradientNoiseScaleCallback("per_example")], **QUIET, max_steps=2).fit(
            OwnSum(), DataLoader(digits(128), 16)
        )


def test_training_is_the_same_where_a_probe_gives_way():
    def weights(callbacks):
        model = OwnSum()
        model.lr = 0.05
        L.Trainer(callbacks=callbacks, **QUIET, max_epochs=1).fit(model, DataLoader(digits(128), 16))
        return [p.detach().clone() for p in model.parameters()]

    for old, new in zip(weights([]), weights([GradientNoiseScaleCallback(every_n_steps=1)]), strict=True):
        assert torch.equal(old, new)
