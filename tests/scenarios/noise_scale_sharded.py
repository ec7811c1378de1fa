"""Scenarios of FSDP2 on the CPU: ``python noise_scale_sharded.py FOLDER RANKS [NAME ...]``, with 2 or 4 ranks.

The first scenario must be one with a trainer, which starts and connects the ranks.

Every scenario returns what JSON can hold; each rank writes its results to FOLDER/rank<r>.json.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

import lightning as L
import pytest
import torch
from helpers.count_ops import count_with_and_without
from helpers.frozen_digits import QUIET, DigitsMLP, digits, in_order, loader
from helpers.gan import GAN, gan_data
from helpers.processes import write_scenarios
from helpers.sharded_pairs import comms
from lightning.pytorch.strategies import ModelParallelStrategy
from scenarios.sharded_pairs import (
    UsersReduceScatter,
    attach_and_detach,
    exact,
    exact_groups,
    exact_hybrid,
    exact_models,
    exact_options,
    irregular,
    refused_probes,
    refused_tensor_parallel_layers,
    sentence,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_wn import GradientNoiseScaleCallback


class ShardedDigits(DigitsMLP):
    """The digits MLP, layer by layer under FSDP2."""

    def __init__(self, *, policy=None, sync_every=1, dtype=None, shape=None, **kwargs):
        super().__init__(**kwargs)
        self.net.to(dtype)
        self.policy = policy or MixedPrecisionPolicy()
        self.sync_every = sync_every
        self.shape = shape

    def mesh(self):
        if self.shape is not None:
            return init_device_mesh("cpu", self.shape, mesh_dim_names=("replicate", "shard"))
        return self.device_mesh["data_parallel"]

    def configure_model(self):
        if isinstance(self.net, FSDPModule):
            return
        mesh = self.mesh()
        for module in (self.net[0], self.net[2], self.net):
            fully_shard(module, mesh=mesh, mp_policy=self.policy)

    def training_step(self, batch, batch_idx):
        if self.sync_every > 1:
            self.net.set_requires_gradient_sync((batch_idx + 1) % self.sync_every == 0)
        return super().training_step(batch, batch_idx)


class Driver(GradientNoiseScaleCallback):
    """Measures every step, and tells JSON what came of it."""

    def __init__(self, **arguments):
        super().__init__(**({"every_n_steps": 1, "ema_decay": 1.0} | arguments))

    def result(self):
        return asdict(self.estimate()) | {
            "rejected": {r.name: n for r, n in self._measurements[0].metric.rejected.items()}
        }


def ranks():
    return int(sys.argv[2])


def model_parallel(callbacks, strategy=None, **settings):
    strategy = strategy or ModelParallelStrategy(
        data_parallel_size=ranks(), tensor_parallel_size=1, process_group_backend="gloo"
    )
    return L.Trainer(callbacks=callbacks, strategy=strategy, devices=ranks(), **(QUIET | settings))


def measure(accumulate=1, steps=400, data=None, model=None, **model_args):
    driver = Driver()
    trainer = model_parallel([driver], max_steps=steps, accumulate_grad_batches=accumulate)
    trainer.fit(model or ShardedDigits(**model_args), data or loader(digits()))
    return driver.result()


# ---------------------------------------------------------------- truth


def float32(folder):
    return measure(steps=600)


def float64(folder):
    return measure(steps=600, dtype=torch.float64, data=loader(digits(dtype=torch.float64)))


def accumulation(folder):
    return measure(accumulate=2)


def accumulation_without_communication(folder):
    """FSDP2 sees the sum of two micro-batches: one sample of 64 on each rank."""
    return measure(accumulate=2, sync_every=2)


def bfloat16_reduction(folder):
    return measure(policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))


def bfloat16_parameters(folder):
    return measure(policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def hybrid(folder):
    return measure(shape=(2, 2), steps=150)


def uneven_batch_sizes(folder):
    class Short(ShardedDigits):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [t[:24] for t in batch] if self.global_rank == 1 else batch

    return measure(model=Short(), data=loader(digits(), 96))


# ---------------------------------------------------------------- what the callback promises


def bit_for_bit(folder):
    same = []
    for policy in (None, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)):
        states = []
        for callbacks in ([], [Driver()]):
            model = ShardedDigits(lr=0.05, optimizer="Adam", policy=policy)
            trainer = model_parallel(callbacks, max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.1)
            trainer.fit(model, loader(digits(700), drop_last=False))
            states.append([p.to_local() for p in model.parameters()])
        same.append(all(torch.equal(a, b) for a, b in zip(*states, strict=True)))
    return same


def random_numbers(folder):
    """The probe draws none of the global generator's."""
    draws = []
    for callbacks in ([], [Driver()]):
        torch.manual_seed(7)
        model_parallel(callbacks, max_steps=3).fit(ShardedDigits(), loader(digits()))
        draws.append(torch.rand(1).item())
    return draws[0] == draws[1]


def collectives(folder):
    return count_with_and_without(
        lambda callbacks: model_parallel(callbacks, max_steps=12), lambda: ShardedDigits(lr=0.1), Driver, steps=12
    )


def exception(folder):
    class Fails(ShardedDigits):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(RuntimeError, match="broken"):
        model_parallel([Driver()], max_steps=9).fit(model, loader(digits()))
    return comms(model)


def by_hand(folder):
    """The same steps under automatic and manual optimization, with a group that is everything."""

    class Manual(ShardedDigits):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()
            self.optimizers().zero_grad()

    said = []
    for model in (ShardedDigits(), Manual()):
        driver = Driver(groups={"all": "net", "first": "net.0"}, probe="sharded")
        model_parallel([driver], max_steps=5).fit(model, in_order(digits(320), ranks()))
        said.append([asdict(driver.estimate(group=group)) for group in (None, "all", "first")])
    return said


def two_networks(folder):
    class Sharded(GAN):
        def configure_model(self):
            for network in (self.generator, self.discriminator):
                if not isinstance(network, FSDPModule):
                    fully_shard(network, mesh=self.device_mesh["data_parallel"])

    driver = Driver()
    model_parallel([driver], max_steps=2).fit(Sharded(toggle=False), in_order(gan_data(), ranks()))
    return [asdict(driver.estimate(index)) for index in (0, 1)]


# ---------------------------------------------------------------- refusals


def refused_runs(folder):
    class Plain(ShardedDigits):
        def configure_model(self):
            pass

    class Part(ShardedDigits):
        def configure_model(self):
            if not isinstance(self.net[0], FSDPModule):
                fully_shard(self.net[0], mesh=self.mesh())

    class Own(ShardedDigits):
        def configure_model(self):
            super().configure_model()
            self.net[0].set_custom_reduce_scatter(UsersReduceScatter())

    def fit(model, strategy=None, **arguments):
        trainer = model_parallel([Driver(probe="sharded", **arguments)], strategy, max_steps=2)
        return sentence(lambda: trainer.fit(model, loader(digits())))

    return {
        "default": fit(Plain(), ModelParallelStrategy(process_group_backend="gloo")),
        "no module": fit(Plain()),
        "part": fit(Part()),
        "own": fit(Own()),
        "preconditioned": fit(ShardedDigits(optimizer="Adam"), preconditioned=True),
        "curvature": fit(ShardedDigits(), curvature_every_n_steps=1),
    }


SCENARIOS = {
    2: [
        float32,
        float64,
        accumulation,
        accumulation_without_communication,
        bfloat16_reduction,
        bfloat16_parameters,
        uneven_batch_sizes,
        bit_for_bit,
        random_numbers,
        collectives,
        exact,
        exact_options,
        exact_models,
        exact_groups,
        by_hand,
        two_networks,
        irregular,
        attach_and_detach,
        exception,
        refused_probes,
        refused_runs,
    ],
    4: [hybrid, exact, exact_hybrid, refused_tensor_parallel_layers],
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_scenarios(SCENARIOS[ranks()], sys.argv[1], sys.argv[3:])
