"""The copy that one more gradient is taken on: right where it can be had, and without a trace in training."""

from __future__ import annotations

import gc
import random
import threading
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from helpers.frozen_digits import QUIET, DigitsMLP, digits, loader, textbook_pair
from helpers.gan import GAN, gan_data, gan_samples
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.probes.silent_copy import SilentCopy


def measure(model, data, steps=6, trainer_args=None, callbacks=(), probe="batch_pair", **arguments):
    callback = GradientNoiseScaleCallback(probe, **({"every_n_steps": 1, "ema_decay": 1.0} | arguments))
    trainer = L.Trainer(callbacks=[callback, *callbacks], **(QUIET | {"max_steps": steps} | (trainer_args or {})))
    trainer.fit(model, data)
    return callback.estimate()


# ---------------------------------------------------------------- models whose training a careless copy would change


class Random(DigitsMLP):
    """Draws from every generator there is, its own included."""

    def __init__(self, lr=0.1):
        super().__init__(lr)
        self.net.insert(1, nn.Dropout(0.3))
        self.own = torch.Generator().manual_seed(5)
        self.numpy = np.random.default_rng(6)
        self.drawn = []

    def training_step(self, batch, batch_idx):
        draws = [random.random(), np.random.rand(), self.numpy.random(), float(torch.rand(()))]
        draws.append(float(torch.rand((), generator=self.own)))
        self.drawn.append(draws)
        return super().training_step((batch[0] * (1 + 0.1 * sum(draws)), batch[1]), batch_idx)


class Stateful(DigitsMLP):
    """Buffers, counters, metrics, logs, and what autograd made and nobody threw away."""

    def __init__(self, lr=0.1):
        super().__init__(lr)
        self.net.insert(1, nn.BatchNorm1d(32))
        self.register_buffer("mean_of_inputs", torch.zeros(64))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.calls, self.hidden, self.outputs = 0, None, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        x -= 0.1  # users normalize in place
        self.mean_of_inputs.lerp_(x.mean(0), 0.1)
        self.calls += 1
        self.hidden = self.net[:3](x)
        out = self.net[3](self.hidden)
        loss = cross_entropy(out, y)
        self.accuracy(out.detach(), y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "calls": float(self.calls)}, on_epoch=True)
        self.outputs.append(loss)
        if self.logger is not None:
            self.logger.log_metrics({"by_hand": float(self.calls)}, step=self.calls)
        return {"loss": loss, "out": out}


class ByHand(DigitsMLP):
    """Everything that manual optimization offers."""

    def __init__(self, lr=0.1):
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        scheduler.step()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01 * batch_idx
        with optimizer.toggle_model():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Keeps(ByHand):
    """Keeps its optimizer and its scheduler, and steps them itself."""

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        self.optimizer_of_mine, self.scheduler_of_mine = optimizers[0], schedulers[0]
        return optimizers, schedulers

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.optimizer_of_mine.zero_grad()
        self.manual_backward(DigitsMLP.training_step(self, batch, batch_idx))
        optimizer.step()
        self.scheduler_of_mine.step()


class InClosure(ByHand):
    def training_step(self, batch, batch_idx):
        def closure():
            optimizer.zero_grad()
            loss = DigitsMLP.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer = self.optimizers()
        optimizer.step(closure=closure)


class Nested(L.LightningModule):
    """A LightningModule in another one."""

    def __init__(self, lr=0.1):
        super().__init__()
        self.inner = Random(lr)

    def training_step(self, batch, batch_idx):
        self.print("a line")
        self.log("rank", float(self.inner.global_rank))
        return self.inner.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class WeightNormed(DigitsMLP):
    """torch's older spelling keeps the computed weight as an attribute."""

    def __init__(self, lr=0.1):
        super().__init__(lr)
        self.net[0] = torch.nn.utils.weight_norm(self.net[0])
        self.net[2] = torch.nn.utils.spectral_norm(self.net[2])


class WithClipping(DigitsMLP):
    def on_after_backward(self):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class HooksOfItsOwn(DigitsMLP):
    """Changes the batch, and a setting, in a hook before the step."""

    def on_train_batch_start(self, batch, batch_idx):
        batch[0].mul_(2.0)
        self.share = float(torch.rand(()))

    def training_step(self, batch, batch_idx):
        return self.share * super().training_step(batch, batch_idx)


class Stops(DigitsMLP):
    """Writes to its Trainer."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            self.trainer.should_stop = True
        assert isinstance(self.trainer, L.Trainer)
        assert self.trainer.world_size == 1
        assert self.global_step == self.trainer.global_step
        return super().training_step(batch, batch_idx)


MODELS = [Random, Stateful, ByHand, Keeps, InClosure, Nested, WeightNormed, WithClipping, HooksOfItsOwn, Stops]


class Watch(L.Callback):
    """Notes all that a careless copy could change."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.seen.append([batch[0].clone(), grads, rates, torch.get_rng_state(), random.getstate()])


class Lines(Logger):
    """Keeps what is logged."""

    name, version = "lines", "0"

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append({key: value for key, value in metrics.items() if not key.startswith("gns/")})

    def log_hyperparams(self, *args, **kwargs):
        pass


def everything(model_class, callbacks):
    L.seed_everything(3, verbose=False)
    model, watch, logger = model_class(lr=0.1), Watch(), Lines()
    # this callback logs at log steps, too
    settings = QUIET | {"max_epochs": 2, "log_every_n_steps": 1, "logger": logger}
    trainer = L.Trainer(callbacks=[*callbacks, watch], **settings)
    trainer.fit(model, loader(digits(160), 16))
    metrics = {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("gns/")}
    own = {name: getattr(model, name, None) for name in ("calls", "drawn")}
    lines = [line for line in logger.lines if line]
    return [model.state_dict(), watch.seen, metrics, own, lines, np.random.get_state()[1].tolist(), trainer.global_step]


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("model_class", MODELS)
def test_training_is_the_same_bit_for_bit(model_class):
    callback = GradientNoiseScaleCallback("batch_pair", every_n_steps=1)
    plain, measured = (everything(model_class, callbacks) for callbacks in ([], [callback]))
    assert callback.estimate().num_measurements > 3
    assert_same(plain, measured)


def test_a_gan_that_learns_is_the_same_bit_for_bit():
    states = []
    for callbacks in ([], [GradientNoiseScaleCallback(every_n_steps=1)]):
        for toggle in (True, False):
            model = GAN(toggle=toggle, lr=0.1)
            L.Trainer(callbacks=callbacks, max_epochs=3, **QUIET).fit(model, DataLoader(gan_data(), 8))
            states.append(model.state_dict())
    assert callbacks[0].estimate(0).probe == "batch_pair"
    assert_same(states[:2], states[2:])


# ---------------------------------------------------------------- what cannot be copied or run


class Locked(DigitsMLP):
    def __init__(self, lr=0.0):
        super().__init__(lr)
        self.lock = threading.Lock()


class Captures(DigitsMLP):
    """A function of this very object: in a copy it still computes with the original's weights."""

    def __init__(self, lr=0.0):
        super().__init__(lr)
        self.predict = lambda x: self.net(x + 0)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.predict(batch[0]), batch[1])


class ReadsItself(DigitsMLP):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class OnlyHere(DigitsMLP):
    """Fails in any object but the first, while it is told to."""

    def __init__(self, lr=0.0, *, fails=True):
        super().__init__(lr)
        self.me, self.fails = id(self), fails

    def training_step(self, batch, batch_idx):
        if self.fails and id(self) != self.me:
            raise KeyError("someone\nelse")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("model_class", "match"),
    [
        (Locked, r"Locked cannot be copied \(TypeError: cannot pickle '_thread.lock' object\)"),
        (Captures, "the loss of a copy of Captures reaches the weights of the original"),
        (OnlyHere, r"`training_step` fails on a copy of the model \(KeyError: 'someone.*else'\)"),
    ],
)
def test_one_sentence_where_it_cannot_be(model_class, match):
    with pytest.raises(ValueError, match=match) as caught:
        measure(model_class(), loader(digits(64), 16))
    assert "\n" not in str(caught.value)
    # as it advises
    assert "accumulate_grad_batches=2" in str(caught.value)
    estimate = measure(model_class(), loader(digits(128), 16), 2, {"accumulate_grad_batches": 2}, probe="micro_batch")
    assert estimate.num_measurements == 2
    assert "probe='consecutive'" in str(caught.value)
    assert measure(model_class(), loader(digits(128), 16), 4, probe="consecutive").num_measurements == 3


def test_a_step_that_reads_its_own_batches():
    with pytest.raises(ValueError, match="training_step takes `dataloader_iter`; let it take `batch`"):
        measure(ReadsItself(), loader(digits(64), 16))
    assert measure(DigitsMLP(), loader(digits(64), 16), 3).num_measurements == 2


class FailOnce(L.Callback):
    """Lets the copy of one optimizer step fail."""

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        model.fails = batch_idx == 3


def test_a_failure_in_mid_run_leaves_the_step_out_and_says_so():
    model = OnlyHere(fails=False)
    with pytest.warns(UserWarning, match=r"`probe='batch_pair'` leaves out steps, and says so once: `training_step` "):
        estimate = measure(model, loader(digits(160), 16), 10, callbacks=[FailOnce()])
    # nine pairs but for one
    assert estimate.num_measurements == 8


def test_no_memory_leaves_the_step_out_and_says_so(monkeypatch):
    class Full(DigitsMLP):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4 and full and id(self) != me:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().training_step(batch, batch_idx)

    model, full = Full(), True
    me = id(model)
    with pytest.warns(UserWarning, match="the device has no memory left for a copy of the model and one more gradient"):
        estimate = measure(model, loader(digits(160), 16), 10)
    assert estimate.num_measurements == 8


# ---------------------------------------------------------------- what the copy has to take along


def two_batches(model, count=32, size=16):
    """The gradients of the first batches of 16 digits, by autograd."""
    x, y = digits(count).tensors
    samples = []
    for start in range(0, count, size):
        loss = cross_entropy(model.net(x[start : start + size]), y[start : start + size])
        grads = torch.autograd.grad(loss, list(model.net.parameters()))
        samples.append(torch.cat([g.flatten() for g in grads]).double())
    return torch.stack(samples)


def in_order(count=32, size=16):
    return DataLoader(digits(count), size)


def test_hooks_of_the_user_fire_and_those_of_this_package_do_not():
    """A measurement by example beside the pair has its hooks on the model when it is copied."""
    fired = []

    class Hooked(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.net[1].register_forward_hook(self.double)

        def double(self, module, args, output):
            fired.append(self)
            return 2 * output

    model = Hooked()
    x, y = digits(32).tensors
    samples = []
    for part in (slice(0, 16), slice(16, 32)):
        grads = torch.autograd.grad(cross_entropy(model.net(x[part]), y[part]), list(model.parameters()))
        samples.append(torch.cat([g.flatten() for g in grads]).double())
    fired.clear()
    beside = GradientNoiseScaleCallback("per_example", every_n_steps=1, prefix="by_example")
    estimate = measure(model, in_order(), 2, callbacks=[beside])
    expected = textbook_pair(torch.stack(samples), [16, 16])
    # float32 gradients, and a difference of norms
    assert estimate.grad_sq_norm == pytest.approx(expected[0], rel=1e-4)
    assert estimate.cov_trace == pytest.approx(expected[1], rel=1e-4)
    assert beside.estimate().num_measurements == 2
    # bound to the object that they are in: the original's two batches, and one of the copy; the check of `per_example`,
    # which would have another copy call them, is left out
    assert [one is model for one in fired] == [True, False, True]


def test_a_copy_has_no_hooks_of_this_package():
    def of_users(module, args, output):
        return output

    def of_ours(module, args, output):
        raise AssertionError

    of_ours.__module__ = "lightning_wn.per_example.engine.hooks"
    model = DigitsMLP()
    for hook in (of_users, of_ours, partial(of_ours)):
        model.net[0].register_forward_hook(hook)
    copied = SilentCopy(L.Trainer(**QUIET), model)._model
    assert list(copied.net[0]._forward_hooks.values()) == [of_users]
    assert len(model.net[0]._forward_hooks) == 3


def test_a_scaler_and_a_fused_optimizer():
    class Fused(DigitsMLP):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.0, fused=True)

    for model in (Fused, DigitsMLP):
        plain = measure(model(), loader(digits()), steps=30)
        # the scale doubles between a batch and the next one
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=3))
        scaled = measure(model(), loader(digits()), steps=30, trainer_args={"plugins": [plugin]})
        assert scaled.num_measurements == plain.num_measurements == 29
        # 11 bits of mantissa in the products
        assert scaled.grad_sq_norm == pytest.approx(plain.grad_sq_norm, rel=0.02)
        assert scaled.cov_trace == pytest.approx(plain.cov_trace, rel=0.02)


class Rarely(GAN):
    """The generator steps once in three batches, by ``batch_idx`` or by a counter of its own."""

    def __init__(self, *, counts):
        super().__init__(toggle=True)
        self.counts, self.calls = counts, 0

    def training_step(self, batch, batch_idx):
        turn, self.calls = self.calls if self.counts else batch_idx, self.calls + 1
        optimizers = self.optimizers()
        for place, name in enumerate(("generator", "discriminator")):
            if place == 0 and turn % 3:
                continue
            self.toggle_optimizer(optimizers[place])
            optimizers[place].zero_grad()
            self.manual_backward(getattr(self, f"{name}_loss")(*batch))
            optimizers[place].step()
            self.untoggle_optimizer(optimizers[place])


@pytest.mark.parametrize(("counts", "partner"), [(False, 1), (True, 3)])
def test_an_optimizer_whose_turn_comes_rarely(counts, partner):
    """By ``batch_idx`` the next batch is its partner, by a counter the next one of its turn."""
    model, callback = Rarely(counts=counts), GradientNoiseScaleCallback("batch_pair", every_n_steps=1, ema_decay=1.0)
    trainer = L.Trainer(callbacks=[callback], **QUIET, max_epochs=1, limit_train_batches=5)
    trainer.fit(model, DataLoader(gan_data(40), 8))
    batches = [slice(8 * i, 8 * i + 8) for i in range(5)]
    pairs = []
    for start in (0, 3):
        if start + partner < 5:
            samples = gan_samples("generator", (batches[start], batches[start + partner]), 40)
            pairs.append(textbook_pair(samples, [8, 8]))
    estimate = callback.estimate(0)
    assert estimate.num_measurements == len(pairs)
    assert callback.estimate(1).num_measurements == 4
    assert estimate.cov_trace == pytest.approx(float(torch.tensor(pairs).mean(0)[1]), rel=1e-4)


def test_several_steps_on_a_batch_have_each_their_own_partner():
    class Twice(ByHand):
        """The second step of a batch follows another loss."""

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for factor in (1.0, 3.0):
                optimizer.zero_grad()
                self.manual_backward(factor * DigitsMLP.training_step(self, batch, batch_idx))
                optimizer.step()

    expected = textbook_pair(two_batches(DigitsMLP(), count=48)[1:], [16, 16])

    # measured is every third step: the first of one batch, and the second of the next one
    estimate = measure(Twice(lr=0.0), in_order(48), 6, every_n_steps=3)
    first = textbook_pair(two_batches(DigitsMLP()), [16, 16])
    mean = (torch.tensor(first) + 9 * torch.tensor(expected)) / 2
    assert estimate.num_measurements == 2
    assert estimate.cov_trace == pytest.approx(float(mean[1]), rel=1e-4)


def test_accumulation_gives_two_samples_of_unequal_sizes():
    samples = two_batches(DigitsMLP(), count=48)
    estimate = measure(DigitsMLP(), in_order(48), 2, {"accumulate_grad_batches": 2, "limit_train_batches": 3})
    expected = textbook_pair(torch.stack((samples[:2].mean(0), samples[2])), [32, 16])
    assert estimate.grad_sq_norm == pytest.approx(expected[0], rel=1e-4)
    assert estimate.cov_trace == pytest.approx(expected[1], rel=1e-4)
    assert estimate.batch_size == 32


def test_accumulation_by_hand_names_the_probe_that_measures_it():
    class Accumulates(ByHand):
        def training_step(self, batch, batch_idx):
            self.manual_backward(DigitsMLP.training_step(self, batch, batch_idx))
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    with pytest.raises(ValueError, match="accumulated by hand: use `probe='micro_batch'`"):
        measure(Accumulates(), loader(digits(128), 16))
    assert measure(Accumulates(), loader(digits(128), 16), 3, probe="micro_batch").num_measurements == 3


def test_batches_that_training_skips():
    class Skips(DigitsMLP):
        def training_step(self, batch, batch_idx):
            return None if bool(batch[1][0] == 9) else super().training_step(batch, batch_idx)

    # the tenth of the digits in order is a nine
    estimate = measure(Skips(), DataLoader(digits(12), 1), 12)
    # eleven pairs; the ninth waits for the batch after that, and the skipped one has none
    assert estimate.num_measurements == 10


def test_compiled_parts_run_as_they_were_written():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = DigitsMLP()
    model.net = torch.compile(model.net, backend=backend)
    estimate = measure(model, in_order(), 2)
    # once, and not again for the copy
    assert len(compiled) == 1
    expected = textbook_pair(two_batches(DigitsMLP()), [16, 16])
    assert estimate.cov_trace == pytest.approx(expected[1], rel=1e-4)


def test_what_others_differentiate_between_passes_is_no_edit():
    class Looks(L.Callback):
        def on_before_optimizer_step(self, trainer, model, optimizer):
            loss = sum(p.square().sum() for p in model.parameters())
            torch.autograd.grad(loss, list(model.parameters()))

    callback = GradientNoiseScaleCallback("batch_pair", every_n_steps=1, ema_decay=1.0)
    L.Trainer(callbacks=[Looks(), callback], **QUIET, max_steps=2).fit(DigitsMLP(), in_order())
    expected = textbook_pair(two_batches(DigitsMLP()), [16, 16])
    assert callback.estimate().cov_trace == pytest.approx(expected[1], rel=1e-4)


def test_what_the_model_does_before_a_step_is_done_to_the_second_batch_too():
    class Doubles(DigitsMLP):
        def on_train_batch_start(self, batch, batch_idx):
            batch[0].mul_(2.0)

    estimate = measure(Doubles(), DataLoader([(x.clone(), y) for x, y in digits(32)], 16), 2)
    model = DigitsMLP()
    x, y = digits(32).tensors
    samples = []
    for part in (slice(0, 16), slice(16, 32)):
        grads = torch.autograd.grad(cross_entropy(model.net(2 * x[part]), y[part]), list(model.parameters()))
        samples.append(torch.cat([g.flatten() for g in grads]).double())
    expected = textbook_pair(torch.stack(samples), [16, 16])
    assert estimate.cov_trace == pytest.approx(expected[1], rel=1e-4)


def test_the_memory_is_given_back_at_once():
    """Without waiting for Python to collect cycles, of which a LightningModule has some."""

    class Big(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.big = nn.Parameter(torch.zeros(250_007))
            self.step_of_mine = self.training_step  # a cycle

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.big.square().sum()

    gc.collect()
    gc.disable()
    try:
        counts = []

        class Count(L.Callback):
            def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
                tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
                counts.append(sum(t.numel() == 250_007 for t in tensors))

        measure(Big(), loader(digits(160), 16), 7, callbacks=[Count()], every_n_steps=3)
    finally:
        gc.enable()
    # parameter and gradient; after a measured step a copy of both; in the next one that is given back
    assert counts == [4, 2, 2, 4, 2, 2, 4]


def test_a_model_that_is_compiled_as_a_whole():
    estimate = measure(torch.compile(DigitsMLP(), backend="eager"), in_order(), 2)
    expected = textbook_pair(two_batches(DigitsMLP()), [16, 16])
    assert estimate.cov_trace == pytest.approx(expected[1], rel=1e-4)
