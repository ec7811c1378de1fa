"""The preconditioned noise scale against per-example gradients over Adam's own denominator."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, per_example_gradients, textbook_pair
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.noise_scale.preconditioning import AdamDenominator


class Snapshot(L.Callback):
    """Keeps model and optimizer as they are before the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and not hasattr(self, "gradients"):
            model = DigitsMLP()
            model.load_state_dict(pl_module.state_dict())
            self.gradients = per_example_gradients(model, digits(64))
            state = trainer.optimizers[0].state
            group = trainer.optimizers[0].param_groups[0]
            self.denominator = torch.cat(
                [
                    (
                        (
                            state[p]["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
                            / (1 - 0.999**self.step)
                        ).sqrt()
                        + 1e-8
                    ).flatten()
                    for p in pl_module.parameters()
                ]
            ).double()


class AMSGrad(torch.optim.AdamW):
    def __init__(self, params, lr):
        super().__init__(params, lr, amsgrad=True)


@pytest.mark.parametrize("optimizer", ["Adam", "AMSGrad"])
@pytest.mark.parametrize("probe", ["micro_batch", "per_example"])
def test_exact_in_one_step(probe, optimizer, monkeypatch):
    """Step 3 on the examples 0 to 31, with what Adam kept of the steps before."""
    monkeypatch.setattr(torch.optim, "AMSGrad", AMSGrad, raising=False)
    accumulate = 2 if probe == "micro_batch" else 1
    callback = GradientNoiseScaleCallback(probe, every_n_steps=1, ema_decay=0.0, preconditioned=True)
    snapshot = Snapshot(3)
    trainer = L.Trainer(callbacks=[snapshot, callback], max_steps=4, accumulate_grad_batches=accumulate, **QUIET)
    trainer.fit(DigitsMLP(lr=1e-3, optimizer=optimizer), DataLoader(digits(32), 32 // accumulate))
    gradients = snapshot.gradients[:32] / snapshot.denominator
    samples = gradients if probe == "per_example" else gradients.reshape(2, 16, -1).mean(1)
    expected = textbook_pair(samples, [1 if probe == "per_example" else 16] * len(samples))
    estimate = callback.estimate(group="preconditioned")
    # float32 gradients over a float32 denominator; |G|² is a difference of norms that nearly cancel
    assert estimate.cov_trace == pytest.approx(expected[1], rel=1e-3)
    assert estimate.grad_sq_norm == pytest.approx(expected[0], rel=1e-3, abs=1e-4 * expected[1])
    # the first step has no denominator yet
    assert estimate.num_measurements == 3
    assert callback.estimate().num_measurements == 4
    plain = textbook_pair(
        snapshot.gradients[:32] if probe == "per_example" else snapshot.gradients[:32].reshape(2, 16, -1).mean(1),
        [1 if probe == "per_example" else 16] * len(samples),
    )
    assert callback.estimate().cov_trace == pytest.approx(plain[1], rel=1e-4)


def test_successive_steps_share_the_denominator():
    """With every step measured, both gradients of a pair are divided by what Adam has at the second."""
    callback = GradientNoiseScaleCallback("consecutive", every_n_steps=1, ema_decay=0.0, preconditioned=True)
    # a learning rate of zero leaves the weights, not Adam's moments
    snapshot = Snapshot(3)
    trainer = L.Trainer(callbacks=[snapshot, callback], max_steps=4, **QUIET)
    trainer.fit(DigitsMLP(lr=0.0, optimizer="Adam"), DataLoader(digits(64), 16))
    samples = (snapshot.gradients / snapshot.denominator).reshape(4, 16, -1).mean(1)[2:]
    expected = textbook_pair(samples, [16, 16])
    estimate = callback.estimate(group="preconditioned")
    assert estimate.cov_trace == pytest.approx(expected[1], rel=1e-3)
    assert estimate.grad_sq_norm == pytest.approx(expected[0], rel=1e-3, abs=1e-4 * expected[1])


def test_optimizers_without_a_second_moment_are_refused_before_training():
    for optimizer in ("SGD", "RMSprop", "Adagrad"):
        callback = GradientNoiseScaleCallback(preconditioned=True)
        trainer = L.Trainer(callbacks=[callback], max_steps=2, accumulate_grad_batches=2, **QUIET)
        with pytest.raises(
            ValueError, match=f"`preconditioned=True` needs .* and {optimizer} keeps no `exp_avg_sq`; use Adam"
        ):
            trainer.fit(DigitsMLP(lr=0.1, optimizer=optimizer), DataLoader(digits(64), 16))
        assert trainer.global_step == 0


def test_an_unknown_optimizer_is_refused_when_its_state_shows():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        def step(self, closure=None):
            self.state[self.param_groups[0]["params"][0]]["momentum"] = torch.zeros(())

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Own([weight])
    denominator = AdamDenominator(optimizer)
    assert denominator(weight) is None
    optimizer.step()
    with pytest.raises(ValueError, match="Own keeps no `exp_avg_sq`"):
        denominator(weight)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_denominators_of_adams_kin(kind):
    """What one step with a known gradient leaves: |g| + ε."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = kind([weight], lr=0.1, eps=0.5)
    weight.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    torch.testing.assert_close(AdamDenominator(optimizer)(weight), torch.tensor([3.5, 4.5]))


def test_amsgrad_divides_by_the_largest_moment():
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.5), eps=0.25, amsgrad=True)
    for gradient in (4.0, 0.0):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
    # the largest moment is the first, 16 / 2; two steps correct it by 1 - 0.5²
    torch.testing.assert_close(AdamDenominator(optimizer)(weight), torch.tensor([(8.0 / 0.75) ** 0.5 + 0.25]))
