"""The learning rate's factor is there in the optimizer's step and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_wn.callbacks.scaled_learning_rate import ScaledLearningRate


def one_weight(optimizer_type=torch.optim.SGD, lr=0.5):
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = optimizer_type([weight], lr=lr)
    scaled = ScaledLearningRate(optimizer)
    scaled.factor = 4.0
    return weight, optimizer, scaled


def test_within_a_closure():
    weight, optimizer, scaled = one_weight()
    seen = []

    def closure():
        seen.append(optimizer.param_groups[0]["lr"])
        scaled.gradient_is_ready()
        seen.append(optimizer.param_groups[0]["lr"])

    optimizer.step(closure)
    assert seen == [0.5, 2.0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert float(weight) == 1.0 - 4.0 * 0.5


@pytest.mark.parametrize("finite", [True, False])
def test_with_a_gradient_scaler(finite):
    """Which calls the step without a closure, or skips it: then the rate must not stay changed for a scheduler."""
    weight, optimizer, scaled = one_weight()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(weight.sum() * (1.0 if finite else float("inf"))).backward()
    weight.grad -= 2.0  # the gradient that it had before
    weight.grad += 1.0
    scaler.unscale_(optimizer)
    scaled.gradient_is_ready()
    scaler.step(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert float(weight) == (1.0 - 4.0 * 0.5 * 1.0 if finite else 1.0)


def test_a_step_that_fails():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("broken")

    _, optimizer, scaled = one_weight(Broken)
    scaled.gradient_is_ready()
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    scaled.detach()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_that_calls_the_step_of_its_base_class():
    """torch runs the hooks of both then; the factor counts once."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)

    class Derived(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    weight, optimizer, scaled = one_weight(Derived)
    scaled.gradient_is_ready()
    optimizer.step()
    assert float(weight) == 1.0 - 4.0 * 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_rate_in_a_tensor_keeps_its_memory():
    rate = torch.tensor(0.5)
    weight, optimizer, scaled = one_weight(lr=rate)
    scaled.gradient_is_ready()
    optimizer.step()
    assert float(weight) == 1.0 - 4.0 * 0.5
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.5
