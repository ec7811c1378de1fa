"""Scenarios for two ranks on the CPU: ``python noise_scale_ddp.py FOLDER``.

Every scenario returns what JSON can hold; each rank writes its results to FOLDER/rank<r>.json.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.count_ops import count_with_and_without
from helpers.frozen_digits import QUIET, DigitsMLP, digits, in_order, loader
from helpers.gan import GAN, gan_data
from helpers.processes import write_scenarios
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback


def two_ranks(callbacks, strategy=None, **settings):
    strategy = strategy or DDPStrategy(process_group_backend="gloo")
    return L.Trainer(callbacks=callbacks, strategy=strategy, devices=2, **(QUIET | settings))


def result(callback) -> dict[str, Any]:
    return asdict(callback.estimate()) | {
        "rejected": {r.name: n for r, n in callback._measurements[0].metric.rejected.items()}
    }


def measure(accumulate=1, steps=400, model=None, data=None, callbacks=(), strategy=None, **callback_args):
    callback = GradientNoiseScaleCallback(**({"every_n_steps": 1, "ema_decay": 1.0} | callback_args))
    trainer = two_ranks([callback, *callbacks], strategy, max_steps=steps, accumulate_grad_batches=accumulate)
    trainer.fit(model or DigitsMLP(), data or loader(digits()))
    return callback


def ddp(folder):
    return result(measure(steps=600))


def ddp_and_accumulation(folder):
    return result(measure(accumulate=2))


def bit_for_bit(folder):
    states = []
    for callbacks in ([], [GradientNoiseScaleCallback(every_n_steps=1)]):
        model = DigitsMLP(lr=0.05, optimizer="Adam")
        trainer = two_ranks(callbacks, max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.1)
        trainer.fit(model, loader(digits(700), drop_last=False))
        states.append(model.state_dict())
    return all(torch.equal(states[1][key], value) for key, value in states[0].items())


def collectives(folder):
    return count_with_and_without(
        lambda callbacks: two_ranks(callbacks, max_steps=25, log_every_n_steps=10),
        lambda: DigitsMLP(lr=0.1),
        lambda: GradientNoiseScaleCallback(every_n_steps=1),
        steps=26,
    )


def resumed(folder):
    class Kill(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("killed")

    def run(name, extra=(), ckpt_path=None):
        callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=0.9)
        saver = ModelCheckpoint(Path(folder) / name, save_last=True)
        settings = {"enable_checkpointing": True, "max_epochs": 4, "log_every_n_steps": 4}
        trainer = two_ranks([callback, saver, *extra], **settings)
        trainer.fit(DigitsMLP(lr=0.05), DataLoader(digits(320), 32), ckpt_path=ckpt_path)
        return result(callback)

    whole = run("whole")
    with pytest.raises(RuntimeError, match="killed"):
        run("killed", [Kill()])
    return [whole, run("resumed", ckpt_path=Path(folder) / "killed" / "last.ckpt")]


def nan_on_one_rank(folder):
    class Poison(DigitsMLP):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 3 and self.global_rank == 1 else loss

        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0.0)

    return result(measure(steps=10, model=Poison(), data=loader(digits(640))))


def uneven_batch_sizes(folder):
    """Rank 1 has batches of 24 beside rank 0's 96."""

    class Short(DigitsMLP):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [t[:24] for t in batch] if self.global_rank == 1 else batch

    return result(measure(model=Short(), data=loader(digits(), 96)))


def sync_batch_norm(folder):
    said = []
    for layer, sync in ((nn.BatchNorm1d(32), True), (nn.SyncBatchNorm(32), False)):
        model = DigitsMLP()
        model.net.insert(1, layer)
        trainer = two_ranks([GradientNoiseScaleCallback("micro_batch")], sync_batchnorm=sync, max_steps=2)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is checked by the test
            trainer.fit(model, loader(digits()))
        said.append(str(caught.value))
    return said


class CommunicationHook(L.Callback):
    def __init__(self, hook):
        self.hook = hook

    def on_fit_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, self.hook)


def tensor_parallel_ranks(folder):
    class Sharded(DigitsMLP):
        def configure_model(self):
            pass

    strategy = ModelParallelStrategy(process_group_backend="gloo")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is checked by the test
        two_ranks([GradientNoiseScaleCallback("sharded")], strategy, max_steps=2).fit(Sharded(), loader(digits()))
    return str(caught.value)


def lossless_communication_hook(folder):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    return result(measure(steps=20, callbacks=[CommunicationHook(fp16_compress_hook)]))


def lossy_communication_hook(folder):
    def keep_local(state, bucket):  # local SGD: the optimizer sees its own rank's gradient
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = result(measure(steps=20, callbacks=[CommunicationHook(keep_local)]))
    said = [str(w.message) for w in caught if "likely causes are" in str(w.message)]
    return outcome | {"said": len(said)}


def unused_parameters(folder):
    class Sometimes(DigitsMLP):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(64, 10)

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            if self.global_rank == 0:
                logits = logits + 0.0 * self.extra(batch[0])
            return nn.functional.cross_entropy(logits, batch[1])

    strategy = DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=True, process_group_backend="gloo")
    return result(measure(steps=20, model=Sometimes(), strategy=strategy))


def groups(folder):
    """One step, in the order of the data."""
    callback = measure(steps=1, data=in_order(digits(64), 2), groups={"first": "net.0", "bias": "*.bias"})
    part = measure(steps=1, data=in_order(digits(64), 2), layers="net.2")
    return [asdict(callback.estimate(group=group)) for group in (None, "first", "bias")] + [asdict(part.estimate())]


def two_networks(folder):
    """Three ways to keep the generator's pass through the discriminator out of its gradient."""
    said = []
    for toggle, set_to_none in ((True, True), (False, True), (False, False)):
        strategy = DDPStrategy(find_unused_parameters=True, process_group_backend="gloo")
        callback = GradientNoiseScaleCallback(every_n_steps=1)
        trainer = two_ranks([callback], strategy, max_steps=2)
        trainer.fit(GAN(toggle=toggle, set_to_none=set_to_none), in_order(gan_data(), 2))
        said.append([asdict(callback.estimate(index)) for index in (0, 1)])
    return said


def static_graph_and_checkpointing(folder):
    class Checkpointed(DigitsMLP):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    strategy = DDPStrategy(static_graph=True, process_group_backend="gloo")
    return result(measure(1, 3, Checkpointed(), DataLoader(digits(96), 16), strategy=strategy))


def compiled(folder):
    model = DigitsMLP()
    model.net.compile(backend="aot_eager")
    return result(measure(1, 3, model, DataLoader(digits(96), 16)))


def plain_steps(folder):
    """What the two before are compared with."""
    return result(measure(1, 3, data=DataLoader(digits(96), 16)))


def iterable(folder):
    """Without a length, and with an epoch cut short; each rank has its own examples."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            rank = torch.distributed.get_rank()
            x, y = digits(192).tensors
            return iter(list(zip(x[rank::2], y[rank::2], strict=True)))

    callback = GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0)
    trainer = two_ranks([callback], accumulate_grad_batches=2, limit_train_batches=5, max_epochs=1)
    trainer.fit(DigitsMLP(), DataLoader(Stream(), 16))
    return result(callback)


SCENARIOS = [
    groups,
    two_networks,
    static_graph_and_checkpointing,
    compiled,
    plain_steps,
    iterable,
    ddp,
    ddp_and_accumulation,
    bit_for_bit,
    collectives,
    resumed,
    nan_on_one_rank,
    uneven_batch_sizes,
    sync_batch_norm,
    tensor_parallel_ranks,
    lossless_communication_hook,
    lossy_communication_hook,
    unused_parameters,
]


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_scenarios(SCENARIOS, sys.argv[1], sys.argv[2:])
