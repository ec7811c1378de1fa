"""Groups of parameters and `layers=`: exact in one step, true over many, under every probe on one device."""

from __future__ import annotations

import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader, per_example_gradients, textbook_pair
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScale, GradientNoiseScaleCallback
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters, find_measured

GROUPS = {"first": "net.0", "weights": "*.weight", "last_bias": ["net.2.bias"]}
# the parameters' places in a flattened gradient of the digits MLP
FIRST, LAST_WEIGHT, LAST_BIAS = slice(0, 2080), slice(2080, 2400), slice(2400, 2410)
COLUMNS = {
    None: [*range(2410)],
    "first": [*range(2080)],
    "weights": [*range(2048), *range(2080, 2400)],
    "last_bias": [*range(2400, 2410)],
}


def measure(model, data, steps=1, accumulate=1, trainer_args=None, **arguments):
    callback = GradientNoiseScaleCallback(**({"every_n_steps": 1, "ema_decay": 1.0} | arguments))
    settings = QUIET | {"max_steps": steps, "accumulate_grad_batches": accumulate} | (trainer_args or {})
    L.Trainer(callbacks=[callback], **settings).fit(model, data)
    return callback


def samples_of(gradients: Tensor, probe: str) -> list[Tensor]:
    """The gradient samples of the first step on 32 examples, or of the first two for the consecutive probe."""
    return list(gradients[:32]) if probe == "per_example" else [gradients[:16].mean(0), gradients[16:32].mean(0)]


@pytest.mark.parametrize(
    ("probe", "batch_size", "steps"), [("micro_batch", 16, 1), ("per_example", 32, 1), ("consecutive", 16, 2)]
)
def test_each_group_is_exact_in_one_measurement(probe, batch_size, steps):
    model, data = DigitsMLP(), digits(64)
    accumulate = 2 if probe == "micro_batch" else 1
    callback = measure(model, DataLoader(data, batch_size), steps, accumulate, probe=probe, groups=GROUPS)
    samples = torch.stack(samples_of(per_example_gradients(model, data), probe))
    size = 1 if probe == "per_example" else 16
    for group, columns in COLUMNS.items():
        expected = textbook_pair(samples[:, columns], [size] * len(samples))
        estimate = callback.estimate(group=group)
        # float32 gradients; |G|² is a difference of norms that nearly cancel
        assert estimate.cov_trace == pytest.approx(expected[1], rel=1e-4)
        assert estimate.grad_sq_norm == pytest.approx(expected[0], rel=1e-4, abs=1e-5 * expected[1])
        assert (estimate.num_measurements, estimate.coverage) == (1, 1.0)
    assert callback.estimates().keys() == {"total", *GROUPS}


@pytest.mark.parametrize("probe", ["micro_batch", "per_example", "consecutive"])
def test_layers_measure_a_part_and_say_so(probe):
    model, data = DigitsMLP(), digits(64)
    batch_size, accumulate = (16, 2) if probe == "micro_batch" else ((32, 1) if probe == "per_example" else (16, 1))
    steps = 2 if probe == "consecutive" else 1
    layers = {"probe": probe, "layers": "net.2", "groups": {"bias": "net.2.bias", "weights": "*.weight"}}
    callback = measure(model, DataLoader(data, batch_size), steps, accumulate, **layers)
    samples = torch.stack(samples_of(per_example_gradients(model, data), probe))
    size = 1 if probe == "per_example" else 16
    for group, columns, share in (
        (None, slice(2080, 2410), 330 / 2410),
        ("bias", LAST_BIAS, 1.0),
        ("weights", LAST_WEIGHT, 320 / 2368),
    ):
        estimate = callback.estimate(group=group)
        expected = textbook_pair(samples[:, columns], [size] * len(samples))
        assert estimate.cov_trace == pytest.approx(expected[1], rel=1e-4)
        assert estimate.coverage == pytest.approx(share)
    assert "13.7%" in str(callback.estimate()) or "14%" in str(callback.estimate())


def test_groups_are_logged_saved_and_resumed(tmp_path):
    groups = {"first": "net.0", "last": "net.2"}
    saver = ModelCheckpoint(tmp_path, save_last=True)
    callback = GradientNoiseScaleCallback(every_n_steps=1, groups=groups)
    settings = QUIET | {"enable_checkpointing": True, "log_every_n_steps": 1}
    trainer = L.Trainer(callbacks=[callback, saver], max_epochs=2, accumulate_grad_batches=2, **settings)
    trainer.fit(DigitsMLP(), loader(digits(256)))
    logged = float(trainer.callback_metrics["gns/first/noise_scale"])
    assert logged == pytest.approx(callback.estimate(group="first").noise_scale)
    assert "gns/last/noise_scale_upper" in trainer.callback_metrics
    # a run with other groups goes on with what it knows: the total, and the group of the same name
    later = GradientNoiseScaleCallback(every_n_steps=1, groups={"last": "net.2", "new": "net.0.bias"})
    trainer = L.Trainer(callbacks=[later], max_epochs=3, accumulate_grad_batches=2, **QUIET)
    trainer.fit(DigitsMLP(), loader(digits(256)), ckpt_path=tmp_path / "last.ckpt")
    assert later.estimate().num_measurements == later.estimate(group="last").num_measurements == 12
    assert later.estimate(group="new").num_measurements == 4


def test_parameters_that_are_unfrozen_join_their_group():
    class Unfreeze(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

    callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=0.0, groups={"weights": "*.weight"})
    seen = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            callback._measurements.synchronize(across_ranks=False)
            seen.append(callback.estimate(group="weights").cov_trace)

    data = digits(32)
    trainer = L.Trainer(callbacks=[callback, Look()], max_epochs=2, accumulate_grad_batches=2, **QUIET)
    trainer.fit(Unfreeze(), DataLoader(data, 16))
    samples = torch.stack(samples_of(per_example_gradients(DigitsMLP(), data), "micro_batch"))
    for cov_trace, columns in zip(seen, ([*range(2080, 2400)], COLUMNS["weights"]), strict=True):
        assert cov_trace == pytest.approx(textbook_pair(samples[:, columns], [16, 16])[1], rel=1e-4)


def test_training_is_the_same_bit_for_bit_with_groups_and_preconditioning():
    states = []
    for callbacks in ([], [GradientNoiseScaleCallback(every_n_steps=1, groups=GROUPS, preconditioned=True)]):
        for accumulate in (1, 2):
            model = DigitsMLP(lr=0.01, optimizer="Adam")
            trainer = L.Trainer(callbacks=callbacks, max_epochs=2, accumulate_grad_batches=accumulate, **QUIET)
            trainer.fit(model, loader(digits(256)))
            states.append(model.state_dict())
    for without, with_callback in ((states[0], states[2]), (states[1], states[3])):
        assert all(torch.equal(with_callback[key], value) for key, value in without.items())


class TestSelection:
    def model(self):
        return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 3)))

    def found(self, selection):
        model = self.model()
        measured = find_measured(model, list(model.parameters()), layers=selection, groups={})
        names = {id(p): name for name, p in model.named_parameters()}
        return [names[id(p)] for p in measured.parameters]

    def test_kinds_of_entries(self):
        assert self.found("2.*") == ["2.0.weight", "2.0.bias"]
        assert self.found("2") == ["2.0.weight", "2.0.bias"]
        assert self.found("torch.nn.LayerNorm") == ["1.weight", "1.bias"]
        assert self.found([nn.LayerNorm, "0.bias"]) == ["0.bias", "1.weight", "1.bias"]
        assert self.found(lambda name, module: isinstance(module, nn.Linear) and module.out_features == 3) == [
            "2.0.weight",
            "2.0.bias",
        ]

    def test_frozen_parameters_are_no_part_of_the_coverage(self):
        model = self.model()
        model[0].requires_grad_(False)
        trainable = [p for p in model.parameters() if p.requires_grad]
        measured = find_measured(model, trainable, layers="1", groups={})
        assert measured.coverage == (4 / 13,)

    def test_tied_parameters_are_found_under_either_name(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        parameters = list(model.parameters())
        for name in ("0.weight", "1.weight"):
            assert find_measured(model, parameters, layers=name, groups={}).parameters == (model[0].weight,)

    def test_bad_input(self):
        model = self.model()
        with pytest.raises(
            ValueError,
            match=r"`layers='3.\*'` matches no trainable parameter of Sequential: the optimizer moves 0.weight",
        ):
            find_measured(model, list(model.parameters()), layers="3.*", groups={})
        with pytest.raises(ValueError, match=r"`groups\['head'\]='head'` matches no trainable parameter"):
            find_measured(model, list(model.parameters()), layers=None, groups={"head": "head"})
        with pytest.raises(ValueError, match=r"names only parameters that `layers='1'` leaves out; widen `layers`"):
            find_measured(model, list(model.parameters()), layers="1", groups={"first": "0"})
        with pytest.raises(TypeError, match="`layers` got 3"):
            GradientNoiseScaleCallback(layers=3)
        for name in ("", "a/b", "total", "preconditioned", "curvature", 3):
            with pytest.raises(ValueError, match="`groups` must have names that can stand in a logged key"):
                GradientNoiseScaleCallback(groups={name: "net.0"})
        with pytest.raises(ValueError, match=r"`group` must be None or one of \['a'\], got 'b'"):
            GradientNoiseScaleCallback(groups={"a": "net"}).estimate(group="b")
        with pytest.raises(ValueError, match=r"`optimizer` must be None or one of \[0\], got 1"):
            GradientNoiseScaleCallback().estimate(optimizer=1)

    def test_before_training_starts(self):
        with pytest.raises(ValueError, match=r"`groups\['head'\]='head.\*'` matches no trainable parameter"):
            measure(DigitsMLP(), loader(digits(64)), groups={"head": "head.*"})


def test_metric_with_groups():
    metric = GradientNoiseScale(ema_decay=1.0, groups=["a"])
    for _ in range(3):
        metric.update(torch.tensor([[3.0, 2.0], [3.0, 2.0]]), [32, 32], torch.tensor([2.0, 1.5]))
    result = metric.compute()
    assert float(result["noise_scale"]) == pytest.approx(64 * 1 / 1)
    assert float(result["a/noise_scale"]) == pytest.approx(32 * 1 / 1)
    with pytest.raises(ValueError, match=r"must have 2 norms a sample"):
        metric.update(torch.tensor([3.0, 3.0]), [32, 32], torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"`group` must be None or one of \['a'\], got 'b'"):
        metric.estimate("b")


def test_a_group_without_norms_yet_is_measured_later():
    """Adam has no denominator at its first step: that column starts one measurement later, the total does not."""
    metric = GradientNoiseScale(groups=["later"])
    for column in (math.nan, 2.0, 2.0):
        metric.update(torch.tensor([[3.0, column]] * 2), [32, 32], torch.tensor([2.0, column / 2]))
    metric.synchronize()
    assert (metric.estimate().num_measurements, metric.estimate("later").num_measurements) == (3, 2)
    same = replace(metric.estimate(), num_measurements=2)
    assert same.noise_scale == 64.0


def test_sums_of_repeated_and_missing_places():
    a, b, c = (nn.Parameter(torch.zeros(n)) for n in (1, 2, 3))
    measured = MeasuredParameters([a, b, c], groups=[[a, c], [c]])
    squares = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    assert measured.add_up([0, 1, 2], squares).tolist() == [111.0, 101.0, 100.0]
    assert measured.add_up([2, 1, 2], squares).tolist() == [111.0, 101.0, 101.0]
    assert measured.add_up([], squares[:0]).tolist() == [0.0, 0.0, 0.0]
