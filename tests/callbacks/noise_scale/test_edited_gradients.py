"""Gradients that somebody edits between the backward pass and the optimizer: measured as they were, or left out.

Every edit is tried at every place, under every probe. A step counts only where its numbers are those of the gradients
as autograd gave them; otherwise it is left out with a warning that names the cause. What is the same factor for all of
a step's gradient (clipping by norm) is no edit: the gradient is measured as it was before.
"""

from __future__ import annotations

import math
import warnings

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.noise_scale.samples import Rejection

STEPS, BATCH = 6, 16


# ---------------------------------------------------------------- edits: of all gradients, in place


def clip_by_norm(parameters):
    torch.nn.utils.clip_grad_norm_(parameters, 0.05)


def clip_by_value(parameters):
    torch.nn.utils.clip_grad_value_(parameters, 1e-3)


def clip_adaptively(parameters):
    """Unit by unit, relative to the weights (Brock et al., arXiv 2102.06171)."""
    for p in parameters:
        limit = 0.005 * p.detach().flatten(1).norm(dim=1).clamp(min=1e-3) if p.ndim > 1 else p.detach().abs() * 0.005
        norm = p.grad.flatten(1).norm(dim=1) if p.ndim > 1 else p.grad.abs()
        p.grad.mul_((limit / norm.clamp(min=1e-12)).clamp(max=1.0).reshape(-1, *[1] * (p.ndim - 1)))


def zero_rows(parameters):
    parameters[0].grad[::2] = 0.0


def zero_one(parameters):
    parameters[-1].grad.zero_()


def add_noise(parameters):
    for p in parameters:
        p.grad.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)


def centralize(parameters):
    """Gradient centralization (Yong et al., arXiv 2004.01461)."""
    for p in parameters:
        if p.ndim > 1:
            p.grad.sub_(p.grad.mean(1, keepdim=True))


def take_signs(parameters):
    for p in parameters:
        p.grad.sign_()


def add_weight_decay(parameters):
    for p in parameters:
        p.grad.add_(p.detach(), alpha=0.1)


def halve_all(parameters):
    for p in parameters:
        p.grad.mul_(0.5)


def scale_by_layer(parameters):
    for factor, p in enumerate(parameters, start=1):
        p.grad.mul_(factor)


UNIFORM = (clip_by_norm, halve_all)
EDITS = (*UNIFORM, clip_by_value, clip_adaptively, zero_rows, zero_one, add_noise, centralize, take_signs,
         add_weight_decay, scale_by_layer)  # fmt: skip


# ---------------------------------------------------------------- places


class Editor(L.Callback):
    """Edits in a hook of a callback."""

    def __init__(self, hook, edit):
        def run(trainer, model, *args):
            edit(list(model.parameters()))

        setattr(self, hook, run)


class Edited(DigitsMLP):
    """Edits in hooks of the model."""

    def __init__(self, hook="", edit=None):
        super().__init__()
        if hook:
            setattr(self, hook, lambda *args, **kwargs: edit(list(self.parameters())))


PLACES = {
    "a callback before ours, on_after_backward": ("on_after_backward", "before"),
    "a callback after ours, on_after_backward": ("on_after_backward", "after"),
    "a callback before ours, on_before_optimizer_step": ("on_before_optimizer_step", "before"),
    "a callback after ours, on_before_optimizer_step": ("on_before_optimizer_step", "after"),
    "the model, on_after_backward": ("on_after_backward", "model"),
    "the model, on_before_optimizer_step": ("on_before_optimizer_step", "model"),
    "the model, configure_gradient_clipping": ("configure_gradient_clipping", "model"),
}
PROBES = {"micro_batch": 2, "per_example": 1, "batch_pair": 1, "consecutive": 1}


def fit(probe, hook, place, edit):
    own = GradientNoiseScaleCallback(probe, every_n_steps=1, ema_decay=1.0)
    others = [] if place == "model" else [Editor(hook, edit)]
    callbacks = [*others, own] if place == "before" else [own, *others]
    model = Edited(hook, edit) if place == "model" else Edited()
    trainer = L.Trainer(
        callbacks=callbacks, **QUIET, max_epochs=1, accumulate_grad_batches=PROBES[probe], limit_train_batches=STEPS
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(digits(STEPS * BATCH), BATCH))
    said = [str(w.message) for w in caught if "left out" in str(w.message) or "leaves out" in str(w.message)]
    return own, said


def unedited(probe):
    own, said = fit(probe, "on_train_epoch_start", "after", lambda parameters: None)
    assert not said
    return own.estimate()


@pytest.fixture(scope="module")
def expected():
    return {probe: unedited(probe) for probe in PROBES}


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("place", PLACES)
def test_each_step_is_right_or_left_out(probe, place, expected):
    hook, where = PLACES[place]
    for edit in EDITS:
        own, said = fit(probe, hook, where, edit)
        estimate, rejected = own.estimate(), own._measurements[0].metric.rejected
        left_out = sum(rejected.values()) - rejected[Rejection.SINGLE_SAMPLE]
        assert estimate.num_measurements + left_out == expected[probe].num_measurements, edit.__name__
        if left_out:
            # one factor after each micro-batch is not one factor of the step
            assert edit not in UNIFORM or (probe, hook) == ("micro_batch", "on_after_backward"), edit.__name__
            assert any("gradients that are edited before this callback reads them" in sentence for sentence in said), (
                edit.__name__,
                said,
            )
        if estimate.num_measurements:
            # what is left is right: all of them, or of none
            truth = expected[probe]
            assert left_out == 0, edit.__name__
            # float32 gradients, and a factor found from a few of their elements
            assert math.isclose(estimate.cov_trace, truth.cov_trace, rel_tol=1e-3), edit.__name__
            assert math.isclose(estimate.grad_sq_norm, truth.grad_sq_norm, rel_tol=1e-3), edit.__name__
