"""Bad input gets one clear sentence, before training where possible."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple, get_args, get_type_hints

import lightning as L
import numpy as np
import pytest
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.noise_scale.batch_counting import count_examples
from lightning_wn.probes.choice import PROBES
from lightning_wn.probes.requirements import parameter_placement


@pytest.mark.parametrize("decay", [-0.01, 1.01, math.nan])
def test_ema_decay(decay):
    with pytest.raises(ValueError, match=r"`ema_decay` must lie in \[0, 1\], got .*; 0.99 smooths over about 100"):
        GradientNoiseScaleCallback(ema_decay=decay)


def test_unknown_probe():
    with pytest.raises(ValueError, match=re.escape(f"`probe` must be one of {['auto', *PROBES]}, got 'micro'")):
        GradientNoiseScaleCallback("micro")


def test_every_probe_has_a_name_that_users_may_give():
    assert get_args(get_type_hints(GradientNoiseScaleCallback.__init__)["probe"]) == ("auto", *PROBES)


@pytest.mark.parametrize("argument", ["every_n_steps", "curvature_every_n_steps"])
@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3", np.int64(0)], ids=repr)
def test_every_n_steps(argument, steps):
    with pytest.raises(ValueError, match=f"`{argument}` must be a positive whole number of optimizer steps"):
        GradientNoiseScaleCallback(**{argument: steps})


@pytest.mark.parametrize("argument", ["every_n_steps", "curvature_every_n_steps"])
def test_whole_numbers_of_numpy(argument):
    GradientNoiseScaleCallback(**{argument: np.int64(3)})


@pytest.mark.parametrize("half_life", [0, -3, math.nan, True, "3"])
def test_half_life_steps(half_life):
    with pytest.raises(ValueError, match="`half_life_steps` must be a positive number of optimizer steps"):
        GradientNoiseScaleCallback(half_life_steps=half_life)


def test_an_endless_half_life_forgets_nothing():
    assert GradientNoiseScaleCallback(half_life_steps=math.inf).half_life_steps == math.inf


def test_decay_and_half_life():
    with pytest.raises(ValueError, match="say the same thing twice; give one of them"):
        GradientNoiseScaleCallback(ema_decay=0.9, half_life_steps=100)


def test_confidence():
    with pytest.raises(ValueError, match="`confidence` must lie between 0 and 1, exclusive, got 95"):
        GradientNoiseScaleCallback(confidence=95)


def test_arguments_after_the_first_are_keywords():
    with pytest.raises(TypeError):
        GradientNoiseScaleCallback("auto", 5)


def refuse(match, model=None, data=None, error=ValueError, callbacks=(), probe="micro_batch", **settings):
    """Fit, and expect the error before any weight changed."""
    model = model or DigitsMLP(lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    settings = QUIET | {"max_steps": 4, "accumulate_grad_batches": 2} | settings
    trainer = L.Trainer(callbacks=[GradientNoiseScaleCallback(probe), *callbacks], **settings)
    with pytest.raises(error, match=match) as caught:
        trainer.fit(model, data or loader(digits()))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def goes_on(match, model=None, data=None, **settings):
    """By default the same run trains to its end, and one warning says why nothing is measured."""
    model, own = model or DigitsMLP(lr=0.1), GradientNoiseScaleCallback()
    trainer = L.Trainer(callbacks=[own], **(QUIET | {"max_steps": 4, "accumulate_grad_batches": 2} | settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, data or loader(digits()))
    said = [str(w.message) for w in caught if "GradientNoiseScaleCallback" in str(w.message)]
    assert trainer.global_step == 4
    assert own.estimate().num_measurements == 0
    assert len([sentence for sentence in said if "measures nothing in this run, which goes on" in sentence]) == 1
    assert len([sentence for sentence in said if "measured nothing: " in sentence]) == 1
    assert all(re.search(match, sentence) for sentence in said)


def test_micro_batches_on_one_device_without_accumulation():
    sentence = r"has one batch size only; set `Trainer\(accumulate_grad_batches=2\)` or more"
    refuse(sentence, probe="micro_batch", accumulate_grad_batches=1)


def test_no_trainable_parameters():
    refuse("holds no parameter with `requires_grad=True`", DigitsMLP(lr=0.1).requires_grad_(False))


def test_sparse_gradients():
    class Sparse(DigitsMLP):
        def __init__(self):
            super().__init__(lr=0.1)
            self.embedding = nn.Embedding(5, 3, sparse=True)

    for check in (refuse, goes_on):
        check("cannot read sparse gradients, and 'embedding' was built with `sparse=True`", Sparse())


def test_batch_tensors_that_disagree():
    class Detection(DigitsMLP):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["pair"], batch_idx)

    # a collating DataLoader would batch the boxes too
    class Batches(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"pair": digits()[:32], "boxes": torch.zeros(77, 4)}

    data = torch.utils.data.DataLoader(Batches(), batch_size=None)
    for check in (refuse, goes_on):
        check("holds parts of 32 and 77 entries; pass `batch_size_fn`", Detection(lr=0.1), data)


def test_batch_without_tensors():
    with pytest.raises(
        ValueError,
        match=r"type str cannot be inferred: nothing in it that is known here tells its length; pass `batch_size_fn`",
    ):
        count_examples("batch", None)
    with pytest.raises(ValueError, match="pass `batch_size_fn`"):
        count_examples({"scalar": torch.tensor(3.0)}, None)
    assert count_examples(torch.zeros(0, 3), None).total == 0


@pytest.mark.parametrize("count", [-1, math.nan, math.inf, None, "8", [8], torch.ones(2, 2)], ids=repr)
def test_batch_size_fn_result(count):
    with pytest.raises(ValueError, match="`batch_size_fn` must return the number of examples"):
        count_examples(torch.zeros(3), lambda batch: count)


@pytest.mark.parametrize("count", [8, 8.0, np.int64(8), torch.tensor(8), torch.tensor([8.0], requires_grad=True)])
def test_batch_size_fn_results_that_are_numbers(count):
    counted = count_examples(torch.zeros(3), lambda batch: count).total
    assert float(counted) == 8
    assert not isinstance(counted, torch.Tensor) or (counted.ndim == 0 and not counted.requires_grad)


def test_batch_sizes_that_can_be_inferred():
    class Named(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor

    @dataclass
    class Record:
        x: torch.Tensor
        tag: str

    x = torch.zeros(6, 2)
    for batch in (x, (x, x[:, 0]), [x, {"y": x, "step": torch.tensor(1)}], Named(x, x), Record(x, "a")):
        assert count_examples(batch, None).total == 6


class Graphs:
    """A batch of graphs as PyTorch Geometric makes it: nodes in one tensor, and a count of the graphs."""

    def __init__(self, nodes, graphs, targets):
        self.x, self.num_graphs, self.y = torch.zeros(nodes, 3), graphs, torch.zeros(targets)


@dataclass
class Molecules:
    """A batch that knows its own length, whatever its tensors are over, as chemprop makes it."""

    atoms: torch.Tensor
    count: int

    def __len__(self):
        return self.count


def test_batches_that_say_what_they_hold():
    graphs, molecules = Graphs(20, 4, 4), Molecules(torch.zeros(20, 3), 4)
    packed = pack_padded_sequence(
        torch.zeros(4, 7, 2), torch.tensor([7, 2, 5, 1]), batch_first=True, enforce_sorted=False
    )
    boxes = [{"boxes": torch.zeros(count, 4)} for count in (3, 0, 2, 5)]
    images = torch.zeros(4, 3, 8, 8)
    for batch in (
        graphs,
        (graphs, torch.zeros(4)),
        molecules,
        (molecules, None, torch.zeros(4, 1)),
        packed,
        boxes,
        (images, boxes),
    ):
        assert count_examples(batch, None).total == 4


def test_targets_by_node_are_no_graphs():
    with pytest.raises(
        ValueError, match="Graphs cannot be inferred: it holds parts of 4 and 20 entries; pass `batch_s"
    ):
        count_examples(Graphs(20, 4, 20), None)
    assert count_examples(Graphs(20, 4, 20), lambda batch: batch.num_graphs).total == 4


def bare(strategy_class):
    return object.__new__(strategy_class)


@pytest.mark.parametrize(
    "strategy_class", [DeepSpeedStrategy, FSDPStrategy, XLAStrategy, SingleDeviceXLAStrategy], ids=lambda c: c.__name__
)
def test_unsupported_strategies(strategy_class):
    with pytest.raises(ValueError, match=f"cannot read per-rank gradients under {strategy_class.__name__}; use"):
        parameter_placement(bare(strategy_class))


def test_supported_strategies():
    class OwnDDP(DDPStrategy):
        pass

    class OwnDeepSpeed(DeepSpeedStrategy):
        pass

    for strategy_class in (SingleDeviceStrategy, DDPStrategy, OwnDDP):
        assert parameter_placement(bare(strategy_class)) == "replicated"
    assert parameter_placement(bare(ModelParallelStrategy)) == "sharded"
    with pytest.raises(ValueError, match="OwnDeepSpeed"):
        parameter_placement(bare(OwnDeepSpeed))


def test_strategy_that_nobody_here_knows():
    class Unknown(Strategy):
        pass

    Unknown.__abstractmethods__ = frozenset()
    with pytest.raises(ValueError, match="cannot read per-rank gradients under Unknown"):
        parameter_placement(bare(Unknown))


def test_trainer_of_the_other_package():
    class Trainer:
        pass

    Trainer.__module__ = "pytorch_lightning.trainer.trainer"
    with pytest.raises(
        TypeError, match=r"a Trainer from the package `pytorch_lightning`.*write `import lightning.pytorch as pl`"
    ):
        GradientNoiseScaleCallback().setup(Trainer(), DigitsMLP(), "fit")


def test_a_probe_for_another_strategy():
    refuse("`probe='sharded'` cannot read gradients under SingleDeviceStrategy; use `probe='auto'`", probe="sharded")


def test_what_a_loss_is_no_mean_over():
    with pytest.raises(ValueError, match=r"`loss_mean_over` must be one of \['auto', 'micro_batch', 'window', 'sum'\]"):
        GradientNoiseScaleCallback(loss_mean_over="tokens")
    for told in ("auto", "micro_batch", "window", "sum"):
        assert GradientNoiseScaleCallback(loss_mean_over=told).loss_mean_over == told
