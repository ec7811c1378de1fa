"""Gradients that are edited between the backward pass and the step: each step is right, or left out and named."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader
from torch import nn

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.noise_scale.samples import Rejection


def agc(model):
    """Adaptive gradient clipping: each row against its weights."""
    for p in model.parameters():
        norm = p.grad.norm(dim=-1, keepdim=True) if p.ndim > 1 else p.grad.norm()
        limit = 1e-3 * (p.norm(dim=-1, keepdim=True) if p.ndim > 1 else p.norm())
        p.grad.mul_((limit / norm.clamp_min(1e-9)).clamp_max(1.0))


def centralize(model):
    for p in model.parameters():
        if p.ndim > 1:
            p.grad.sub_(p.grad.mean(1, keepdim=True))


EDITS = {
    "by_value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-3),
    "one_layer_by_norm": lambda m: nn.utils.clip_grad_norm_(m.net[0].parameters(), 1e-3),
    "agc": agc,
    "centralized": centralize,
    "noise": lambda m: [p.grad.add_(torch.randn_like(p), alpha=0.05) for p in m.parameters()],
    "zeroed_rows": lambda m: m.net[0].weight.grad[:16].zero_(),
    "zeroed_bias": lambda m: m.net[2].bias.grad.zero_(),
    "one_bias_doubled": lambda m: m.net[0].bias.grad.mul_(2),
    "decayed": lambda m: [p.grad.add_(p.detach(), alpha=0.1) for p in m.parameters()],
    "sign": lambda m: [p.grad.sign_() for p in m.parameters()],
    "none": lambda m: setattr(m.net[0].weight, "grad", None),
    "all_zero": lambda m: [p.grad.zero_() for p in m.parameters()],
}
SCALED = {
    "clipped_by_norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3),
    "halved": lambda m: [p.grad.mul_(0.5) for p in m.parameters()],
    "negated": lambda m: [p.grad.neg_() for p in m.parameters()],
}
HOOKS = ("on_after_backward", "on_before_optimizer_step")


class Edited(DigitsMLP):
    def on_after_backward(self):
        self.edit(self)


class Edit(L.Callback):
    def __init__(self, hook, edit):
        setattr(self, hook, lambda trainer, model, *_: edit(model))


def fit(edit, hook=None, first=True):
    model = DigitsMLP() if hook else Edited()
    model.edit = edit
    callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0)
    callbacks = [callback] if hook is None else [Edit(hook, edit), callback] if first else [callback, Edit(hook, edit)]
    L.Trainer(callbacks=callbacks, max_steps=6, **QUIET).fit(model, loader(digits(192)))
    return callback


@pytest.fixture(scope="module")
def plain():
    return fit(lambda m: None).estimate()


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_leaves_the_step_out_and_is_named(edit):
    with pytest.warns(UserWarning, match="gradients that are edited before this callback reads them"):
        callback = fit(EDITS[edit])
    assert callback.estimate().num_measurements == 0
    assert callback._measurements[0].metric.rejected[Rejection.MISMATCH] == 6


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_in_every_hook_of_every_callback(hook, first, plain):
    callback = fit(EDITS["by_value"], hook, first)
    found = callback.estimate().num_measurements
    # after ours, in the last hook before the step, nothing was edited yet when it read
    assert found == (6 if (hook, first) == ("on_before_optimizer_step", False) else 0)
    if found:
        assert callback.estimate().cov_trace == pytest.approx(plain.cov_trace, rel=1e-5)


@pytest.mark.parametrize("edit", SCALED)
def test_one_factor_for_all_is_measured_as_it_was_before(edit, plain):
    estimate = fit(SCALED[edit]).estimate()
    assert estimate.num_measurements == 6
    # the factor is that of float32 gradients
    assert estimate.grad_sq_norm == pytest.approx(plain.grad_sq_norm, rel=1e-3)
    assert estimate.cov_trace == pytest.approx(plain.cov_trace, rel=1e-4)


def test_a_factor_of_one_parameter_alone_is_no_factor_for_all():
    class One(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 10, bias=False)

        def on_after_backward(self):
            self.net.weight.grad[:5].mul_(0.5)

    callback = GradientNoiseScaleCallback(every_n_steps=1)
    L.Trainer(callbacks=[callback], max_steps=3, **QUIET).fit(One(), loader(digits(192)))
    assert callback.estimate().num_measurements == 0


def test_hooks_on_tensors_are_found():
    model = DigitsMLP()
    model.net[2].weight.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    callback = GradientNoiseScaleCallback("per_example", every_n_steps=1)
    with pytest.raises(ValueError, match=r"'net\.2\.weight' .* a hook on the parameter edits its gradient"):
        L.Trainer(callbacks=[callback], max_steps=3, **QUIET).fit(model, loader(digits(192)))


def test_hooks_on_tensors_that_come_later_are_found():
    class Later(DigitsMLP):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.net[2].weight.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))

    callback = GradientNoiseScaleCallback("per_example", every_n_steps=1)
    L.Trainer(callbacks=[callback], max_steps=3, **QUIET).fit(Later(), loader(digits(192)))
    assert callback.estimate().num_measurements == 1


def test_zeroed_rows_of_an_embedding_are_found():
    class Tokens(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(500, 80), nn.Linear(80, 10)

        def training_step(self, batch, batch_idx):
            tokens = (batch[0].abs() * 16).long() % 500
            return nn.functional.cross_entropy(self.head(self.table(tokens).mean(1)), batch[1])

        def on_after_backward(self):
            self.table.weight.grad[3:9] = 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    callback = GradientNoiseScaleCallback(every_n_steps=1)
    L.Trainer(callbacks=[callback], max_steps=3, **QUIET).fit(Tokens(), loader(digits(192)))
    assert callback.estimate().num_measurements == 0


def test_no_hook_is_on_the_model_between_steps_and_after_the_backward_pass():
    seen = []

    class Look(L.Callback):
        def on_after_backward(self, trainer, model):
            self.on_train_batch_end(trainer, model)

        def on_train_batch_end(self, trainer, model, *_):
            seen.append(
                any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
                or any(p._backward_hooks for p in model.parameters())
            )

    callback = GradientNoiseScaleCallback(every_n_steps=1)
    L.Trainer(callbacks=[callback, Look()], max_steps=3, **QUIET).fit(DigitsMLP(), loader(digits(192)))
    assert len(seen) == 6
    assert not any(seen)
