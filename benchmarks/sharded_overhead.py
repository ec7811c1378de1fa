"""What the sharded probe costs under FSDP2 on two CPU ranks, beside two bare norms of the whole gradient.

Twelve layers 1024 -> 1024, each a parameter group of its own, over gloo. What the probe does in a step is timed
where it does it: in the reduce-scatters and before and after the backward pass. Two bare ``torch._foreach_norm``
passes over gradients of the whole size run in the same loop. Medians of rank 0's CPU time, and the peak of live
tensor bytes with the probe and without it. Run it with ``python benchmarks/sharded_overhead.py``.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peak_memory import peak_bytes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_wn.probes import MeasuredParameters, ShardedProbe


class TimedProbe(ShardedProbe):
    """Adds up what is spent inside the reduce-scatters."""

    spent = 0.0

    def _see_gradient(self, *args: Any) -> None:
        start = time.thread_time()
        super()._see_gradient(*args)
        self.spent += time.thread_time() - start


def work(rank: int, port: int, repeats: int, width: int, layers: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers)])
    whole = [torch.randn_like(p) for p in model.parameters()]
    size = sum(g.numel() * g.element_size() for g in whole)
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    parameters, x = list(model.parameters()), torch.randn(64, width)
    measured = MeasuredParameters(parameters)
    probe = TimedProbe()
    probe.begin(0, 1, model, measured)
    steps, costs, floors = [], [], []

    def step(*, with_probe: bool = True) -> float:
        """Train one step and return what the probe spent outside the reduce-scatters."""
        for parameter in parameters:
            parameter.grad = None
        start = time.thread_time()
        if with_probe:
            probe.begin(0, 1, model, measured)
            probe.before_backward()
        spent = time.thread_time() - start
        model(x).square().mean().backward()
        start = time.thread_time()
        if with_probe:
            probe.after_backward(64, 1.0, None)
            samples = probe.finish(None, full=True)
            assert samples is not None
            samples.to_row()
        return spent + time.thread_time() - start

    for _ in range(repeats + 3):
        probe.spent = 0.0
        start = time.thread_time()
        outside = step()
        steps.append(time.thread_time() - start)
        costs.append(outside + probe.spent)
        start = time.thread_time()
        torch._foreach_norm(whole)
        torch._foreach_norm(whole)
        floors.append(time.thread_time() - start)
    peaks = {kind: peak_bytes(lambda kind=kind: step(with_probe=kind)) for kind in (True, False)}
    if rank == 0:
        one, cost, floor = (statistics.median(values[3:]) for values in (steps, costs, floors))
        cadence = ShardedProbe.default_every_n_steps
        print(f"{size / 4e6:.1f} M parameters on two ranks: a step {one * 1e3:.1f} ms")
        print(f"  probe {cost * 1e3:.2f} ms, two bare norms of all of it {floor * 1e3:.2f} ms: {cost / floor:.2f}")
        print(
            f"  at the default (one step in {cadence}): {1 + cost / cadence / (one - cost):.4f}x plain  (at most 1.01)"
        )
        extra = peaks[True] - peaks[False]
        print(
            f"  peak memory of tensors: {extra} bytes more, {extra / size:.4%} of the parameters' bytes  (at most 1 %)"
        )
    probe.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, arguments.repeats, arguments.width, arguments.layers), nprocs=2)
