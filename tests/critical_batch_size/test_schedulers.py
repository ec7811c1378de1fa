"""Step-based schedulers in branches: as many steps over the same data as the base batch size makes."""

from __future__ import annotations

import json
import math

import lightning as L
import pytest
import torch
from helpers.processes import SCENARIOS, run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn import measure_critical_batch_size

SETTINGS = {"accelerator": "cpu"}


class Counts(L.LightningModule):
    """Writes down, after each batch, the epoch, the examples of the epoch so far, and the scheduler's steps."""

    def __init__(self, plan=lambda optimizer, trainer: torch.optim.lr_scheduler.StepLR(optimizer, 10**6)):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.plan = plan

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - 1).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": self.plan(optimizer, self.trainer), "interval": "step"}]

    def on_train_start(self):
        self.seen = traces.setdefault(self.trainer.callbacks[-1].schedule.batch_size, [])
        self.begun = self.lr_schedulers().last_epoch
        self.told = told[self.trainer.callbacks[-1].schedule.batch_size] = self.trainer.estimated_stepping_batches

    def on_train_epoch_start(self):
        self.here = 0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.here = getattr(self, "here", 0) + len(batch[0])
        made = self.lr_schedulers().last_epoch - self.begun
        self.seen.append((self.trainer.current_epoch, self.here, made, self.trainer.is_last_batch))


traces = {}
"""By batch size."""
told = {}
"""How many steps the model was told that training takes."""


@pytest.fixture(autouse=True)
def _afresh():
    traces.clear(), told.clear()


def measure(directory, data, sizes, model=None, **arguments):
    arguments = {"num_examples": 320, "trainer_kwargs": SETTINGS, "progress_bar": False} | arguments
    return measure_critical_batch_size(model or Counts(), data, sizes, directory=directory, **arguments)


def loader(length, size, **arguments):
    return DataLoader(TensorDataset(torch.randn(length, 1)), size, **arguments)


def require_base_steps(size, base, num_examples, window):
    """At every end of a window, as many scheduler steps as windows of ``base`` fit into the data so far.

    An epoch ends with a short one, and so does a branch, which may run a little beyond its examples.
    """
    before, total, made_at_end = 0, 0, 0
    for index, (epoch, here, made, is_last) in enumerate(traces[size]):
        if index and epoch != traces[size][index - 1][0]:
            before, total = made_at_end, total + traces[size][index - 1][1]
        is_over = index == len(traces[size]) - 1
        if not (here % window == 0 or is_last or is_over):
            continue
        counted = min(here, num_examples - total)
        made_at_end = before + (math.ceil(counted / base) if is_last or is_over else counted // base)
        assert made == made_at_end, (size, epoch, here)
    return made_at_end


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", ["accumulated", "made to order", "little room"])
@pytest.mark.parametrize("length", [80, 100, 97, 63, 40, 9])
def test_short_batches_and_windows(tmp_path, length, kind, drop_last):
    """Several epochs; 250 examples end in the middle of one, and of a window of the larger sizes."""
    if length == 9 and drop_last:
        pytest.skip("no batch of 16")
    data = loader(length, 8, drop_last=drop_last)
    if kind != "accumulated":
        data = lambda size: loader(length, size, drop_last=drop_last)  # noqa: E731 - as users write it
    sizes = (8, 16, 24, 64)
    if drop_last and kind == "made to order":
        sizes = [size for size in sizes if size <= length]
    room = {"max_micro_batch": 8} if kind == "little room" else {}
    measure(tmp_path, data, sizes, num_examples=250, **room)
    made = {size: require_base_steps(size, 8, 250, size) for size in sizes}
    if not drop_last:
        assert len(set(made.values())) == 1
    # what a model plans its scheduler with
    assert told == made


def test_a_base_that_is_no_multiple_of_the_micro_batch(tmp_path):
    """Steps of 8 over batches of 16, and of 12: a batch of 16 has one of them, two after the next."""
    measure(tmp_path / "8", loader(100, 16), (16, 32), base_batch_size=8)
    assert {size: require_base_steps(size, 8, 320, size) for size in (16, 32)} == told == {16: 42, 32: 42}
    traces.clear()
    measure(tmp_path / "12", loader(100, 16), (16, 32), base_batch_size=12)
    assert {size: require_base_steps(size, 12, 320, size) for size in (16, 32)} == told == {16: 29, 32: 29}


def test_sizes_that_are_no_multiples_of_the_base(tmp_path):
    measure(tmp_path, lambda size: loader(100, size), (32, 48, 80), num_examples=500)
    assert {require_base_steps(size, 32, 500, size) for size in (32, 48, 80)} == {20}


def test_below_the_base(tmp_path):
    """A scheduler that steps with the optimizer cannot be held back; without one it is told steps of the base."""
    with pytest.raises(ValueError, match="must not go below `base_batch_size`"):
        measure(tmp_path / "steps", lambda size: loader(100, size), (8, 16), base_batch_size=16)
    ended = []

    class Free(Counts):
        def configure_optimizers(self):
            self.told = self.trainer.estimated_stepping_batches
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def on_train_start(self):
            pass

        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

        def on_train_end(self):
            ended.append((self.trainer.global_step, self.told))

    measure(tmp_path / "free", lambda size: loader(100, size), (8, 16), Free(), base_batch_size=16, num_examples=250)
    # 7 steps of 16 in an epoch of 100, and 4 in 50
    assert ended == [(2 * 13 + 7, 2 * 7 + 4), (2 * 7 + 4, 2 * 7 + 4)]


@pytest.mark.parametrize("length", [100, 97, 80])
def test_a_schedule_that_allows_no_step_more(tmp_path, length):
    """OneCycleLR raises if it is stepped beyond its total."""

    def plan(optimizer, trainer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=trainer.estimated_stepping_batches)

    measure(tmp_path, lambda size: loader(length, size), (8, 32, 64), Counts(plan), num_examples=1001)
    assert len({require_base_steps(size, 8, 1001, size) for size in (8, 32, 64)}) == 1


def test_max_steps_says_the_same(tmp_path):
    asked = []

    def plan(optimizer, trainer):
        asked.append((trainer.max_steps, trainer.estimated_stepping_batches))
        return torch.optim.lr_scheduler.StepLR(optimizer, 10**6)

    measure(tmp_path, loader(100, 8), (8, 32), Counts(plan), num_examples=1000)
    assert asked == [(130, 130)] * 2
    asked.clear()
    settings = {"trainer_kwargs": SETTINGS | {"max_steps": 500}}
    measure(tmp_path / "longer", loader(100, 8), (8, 32), Counts(plan), num_examples=1000, **settings)
    assert asked == [(500, 500)] * 2


@pytest.mark.parametrize("limit", [5, 0.5])
def test_epochs_that_are_cut(tmp_path, limit):
    """`limit_train_batches` ends an epoch and its last window."""
    settings = {"trainer_kwargs": SETTINGS | {"limit_train_batches": limit}}
    measure(tmp_path, loader(100, 8), (8, 16, 32), num_examples=250, **settings)
    made = {size: require_base_steps(size, 8, 250, size) for size in (8, 16, 32)}
    assert made == told == dict.fromkeys((8, 16, 32), 32)


def test_data_of_unknown_length(tmp_path):
    """Nothing says beforehand that epochs end short: the branch is as long as it is asked to be nevertheless."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(1),)] * 100)

    measure(tmp_path, lambda size: DataLoader(Stream(), size), (8, 32), num_examples=1000)
    assert {require_base_steps(size, 8, 1000, size) for size in (8, 32)} == {130}
    assert told == {8: 125, 32: 125}


def test_batches_of_unequal_sizes(tmp_path):
    """Token budgets: a step of the base is one batch, whatever it holds."""
    sizes = (8, 6, 5, 8, 7, 3, 6, 5, 8, 4)
    batches = DataLoader(TensorDataset(torch.zeros(60, 1)), batch_sampler=[range(size) for size in sizes])
    measure(tmp_path, batches, (8, 16, 32), num_examples=120)
    for size, window in ((16, 2), (32, 4)):
        made = [trace[2] for trace in traces[size]]
        assert made[window - 1 : 10 : window] == list(range(window, 11, window))
        assert made[9] == 10


class TestBehindACheckpoint:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        def save(batches):
            model = Counts()
            model.on_train_start = model.on_train_batch_end = lambda *_: None
            saves = ModelCheckpoint(tmp_path, every_n_train_steps=batches, filename="{step}")
            trainer = L.Trainer(max_steps=batches, logger=False, enable_progress_bar=False, callbacks=[saves],
                                accelerator="cpu", enable_model_summary=False)  # fmt: skip
            trainer.fit(model, loader(100, 8))
            return tmp_path / f"step={batches}.ckpt"

        return save

    @pytest.mark.parametrize("made", [False, True])
    def test_from_the_end_of_an_epoch(self, tmp_path, checkpoint, made):
        data = (lambda size: loader(100, size)) if made else loader(100, 8)
        measure(tmp_path / "branches", data, (8, 16, 64), ckpt_path=checkpoint(26), num_examples=250)
        assert {require_base_steps(size, 8, 250, size) for size in (8, 16, 64)} == {33}
        assert set(told.values()) == {math.inf}

    def test_from_the_middle(self, tmp_path, checkpoint):
        """Eight of 13 batches are behind: five more, and then whole epochs."""
        measure(tmp_path / "branches", loader(100, 8), (8, 16, 64), ckpt_path=checkpoint(8), num_examples=250)
        first = {size: [trace for trace in traces[size] if trace[0] == 0] for size in (8, 16, 64)}
        assert {len(trace) for trace in first.values()} == {5}
        assert {trace[-1][2] for trace in first.values()} == {5}
        assert len({trace[-1][2] for trace in traces.values()}) == 1

    @pytest.mark.parametrize("batches", [3, 12])
    def test_from_the_middle_with_data_made_to_order(self, tmp_path, checkpoint, batches):
        sizes = (8, 32, 64)
        measure(tmp_path / "branches", lambda size: loader(100, size), sizes, ckpt_path=checkpoint(batches))
        for size in sizes:
            assert traces[size][-1][2] == require_base_steps(size, 8, 320, size)


def test_two_ranks(tmp_path):
    """100 examples are 50 on each; steps of 16 are 7 in an epoch, and 64 is 32 and 18 on each rank."""
    run_script(SCENARIOS / "critical_batch_size.py", str(tmp_path), "schedulers", ranks=2)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"schedulers{rank}.json").read_text())
        assert found == {"made": [[16, 18, 18], [32, 10, 18], [64, 5, 18]] * 2, "told": [18] * 6}
