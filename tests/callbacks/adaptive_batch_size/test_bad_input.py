"""Bad input to AdaptiveBatchSizeCallback gets one clear sentence, before training."""

from __future__ import annotations

import re
import sys

import lightning as L
import pytest
import torch
import yaml
from helpers.frozen_digits import QUIET, DigitsMLP, digits, first_length, loader
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LightningCLI

from lightning_wn import AdaptiveBatchSizeCallback, GradientNoiseScaleCallback
from lightning_wn.batch_size.learning_rate import LEARNING_RATE_RULES


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target": -1.0}, "`target` must be a positive fraction"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of optimizer steps, 1 or more, got 0"),
        ({"warmup_steps": 1.5}, "`warmup_steps` must be a whole number of optimizer steps, 0 or more, got 1.5"),
        ({"learning_rate": "cubic"}, f"`learning_rate` must be one of {list(LEARNING_RATE_RULES)}, got 'cubic'"),
        ({"scheduler_clock": "wall"}, "`scheduler_clock` must be one of ['auto', 'batches', 'steps'], got 'wall'"),
        ({"schedule": {}}, "`schedule` must map positions"),
        ({"schedule": {0: 2}, "schedule_by": "hour"}, "`schedule_by` must be one of ['step', 'epoch', 'examples',"),
        ({"schedule": {0: 2}, "schedule_by": "tokens"}, "`schedule_by='tokens'` needs `batch_size_fn`"),
        ({"schedule": {0: 2}, "max_accumulate": 8}, "`max_accumulate=8` is for following the noise scale"),
        ({"schedule": {0: 2}, "target": 0.5}, "`target=0.5` is for following the noise scale"),
        ({"schedule": {0: 2}, "every_n_steps": 7}, "`every_n_steps=7` is for following the noise scale"),
    ],
)
def test_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        AdaptiveBatchSizeCallback(**arguments)


def test_arguments_after_the_first_are_keywords():
    with pytest.raises(TypeError):
        AdaptiveBatchSizeCallback(0.1, {0: 1})


def refuse(match, callbacks, model=None, error=ValueError, change=None, **settings):
    model = model or DigitsMLP(lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = L.Trainer(callbacks=callbacks, **(QUIET | {"max_epochs": 1} | settings))
    if change:
        change(trainer)
    with pytest.raises(error, match=match) as caught:
        trainer.fit(model, loader(digits(320)))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def scheduled(**arguments):
    return AdaptiveBatchSizeCallback(schedule={0: 2}, **arguments)


def test_manual_optimization():
    model = DigitsMLP(lr=0.1)
    model.automatic_optimization = False
    refuse("which Lightning leaves to you in manual optimization", [scheduled()], model)


def test_deepspeed(monkeypatch):
    """What tells DeepSpeed from the others is that it accumulates by itself."""
    strategy = type("DeepSpeedStrategy", (L.pytorch.strategies.SingleDeviceStrategy,), {})
    strategy.handles_gradient_accumulation = property(lambda self: True)
    refuse("under DeepSpeedStrategy, which accumulates by itself", [scheduled()], strategy=strategy("cpu"))
    assert L.pytorch.strategies.DeepSpeedStrategy.handles_gradient_accumulation.fget(None) is True


def test_lbfgs():
    refuse("cannot accumulate for LBFGS", [scheduled()], DigitsMLP(lr=0.1, optimizer="LBFGS"))


def test_an_optimizer_without_learning_rate():
    model = DigitsMLP(lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    model.configure_optimizers = lambda: optimizer
    refuse("cannot rescale the learning rate of SGD, which has none", [scheduled()], model)


def test_a_second_scheduler():
    refuse("and `GradientAccumulationScheduler` would both", [scheduled(), GradientAccumulationScheduler({1: 2})])
    refuse("Two `AdaptiveBatchSizeCallback`s in one Trainer", [scheduled(), scheduled(prefix="other")])


def test_no_noise_scale():
    refuse("the Trainer has no `GradientNoiseScaleCallback`; add one", [AdaptiveBatchSizeCallback()])
    refuse("the Trainer has no `GradientNoiseScaleCallback`; add one", [scheduled(learning_rate="adam")])


def test_which_noise_scale():
    two = [GradientNoiseScaleCallback(prefix=name) for name in ("gns", "mine")]
    refuse(
        r"`noise_scale_prefix` must name one of .*, got None; their prefixes are \['gns', 'mine'\]",
        [*two, AdaptiveBatchSizeCallback()],
    )
    refuse("got 'yours'; their prefixes", [*two, AdaptiveBatchSizeCallback(noise_scale_prefix="yours")])
    adaptive = AdaptiveBatchSizeCallback(noise_scale_prefix="mine")
    L.Trainer(callbacks=[*two, adaptive], **QUIET, max_epochs=1).fit(DigitsMLP(lr=0.1), loader(digits(320)))
    assert adaptive._noise_scale is two[1]


def test_a_start_out_of_bounds():
    noise_scale = GradientNoiseScaleCallback()
    refuse(
        r"`Trainer\(accumulate_grad_batches=2\)`, where the run starts, must lie between `min_accumulate=4`",
        [noise_scale, AdaptiveBatchSizeCallback(min_accumulate=4)],
        accumulate_grad_batches=2,
    )
    refuse("contradict each other on the start", [scheduled()], accumulate_grad_batches=4)


def test_a_noise_scale_that_comes_too_late_for_the_learning_rate():
    refuse(
        "goes by the noise scale, and none was measured before the schedule changed",
        [GradientNoiseScaleCallback(), AdaptiveBatchSizeCallback(schedule={0: 1, 0 + 3: 2}, learning_rate="sgd")],
        DigitsMLP(lr=0.0),
        error=RuntimeError,
        log_every_n_steps=50,
    )


def test_an_optimizer_without_hooks():
    class Bare(torch.optim.SGD):
        def step(self, closure=None):
            closure()

    Bare.step.hooked = True  # what torch sets where it has wrapped the step
    model = DigitsMLP(lr=0.1)
    model.configure_optimizers = lambda: Bare(model.parameters(), lr=0.1)
    refuse("cannot put a factor on the learning rate of Bare", [scheduled()], model, error=RuntimeError)


def with_scheduler(**config):
    model = DigitsMLP(lr=0.1)

    def configure():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"} | config]

    model.configure_optimizers = configure
    return model


@pytest.mark.parametrize(
    ("model", "schedule", "settings", "sentence"),
    [
        (DigitsMLP, {0: 2}, {"max_steps": 3}, r"`Trainer\(max_steps=3\)` counts optimizer steps"),
        (lambda: with_scheduler(frequency=2), {0: 2}, {"max_epochs": 1}, "and `frequency=2` goes on counting"),
        (with_scheduler, {0: 4, 1: 2}, {"max_epochs": 1}, "run ahead while the batch size is below its first one"),
    ],
)
def test_what_counts_optimizer_steps_is_warned_of(model, schedule, settings, sentence):
    trainer = L.Trainer(callbacks=[AdaptiveBatchSizeCallback(schedule=schedule)], **QUIET, **settings)
    with pytest.warns(UserWarning, match=sentence):
        trainer.fit(model(), loader(digits(320)))


@pytest.mark.parametrize(
    "init_args",
    [
        {},
        {"target": 0.2, "max_accumulate": 8, "learning_rate": "adam", "allow_decrease": True},
        {"schedule": {0: 1, 3: 2}, "schedule_by": "examples", "batch_size_fn": "helpers.frozen_digits.first_length"},
    ],
)
def test_from_the_yaml_file_of_a_command_line(monkeypatch, tmp_path, init_args):
    name = "lightning_wn.AdaptiveBatchSizeCallback"
    callbacks = [
        {"class_path": "lightning_wn.GradientNoiseScaleCallback"},
        {"class_path": name, "init_args": init_args},
    ]
    config = {"trainer": QUIET | {"max_epochs": 1, "callbacks": callbacks}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(
        DigitsMLP, args=["--config", str(path)], run=False, save_config_callback=None, seed_everything_default=False
    )
    adaptive = next(c for c in cli.trainer.callbacks if isinstance(c, AdaptiveBatchSizeCallback))
    assert adaptive.target == init_args.get("target", 0.1)
    assert (adaptive.batch_size_fn is first_length) == ("batch_size_fn" in init_args)
    cli.trainer.fit(cli.model, loader(digits(320)))
    assert adaptive.accumulate_grad_batches == (2 if "schedule" in init_args else 1)
