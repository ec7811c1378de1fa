"""Small models under FSDP2 beside plain copies, and the probe's norms beside those of the copies."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.samples import _GRAD_SQ_NORM, Measurement, measurement_from_row
from lightning_wn.probes.sharded import ShardedProbe


class Uneven(nn.Module):
    """Two layers whose sizes no number of ranks divides, and one that may be left out."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.second = nn.Linear(7, 3, dtype=dtype)
        self.spare = nn.Linear(7, 3, dtype=dtype)

    def forward(self, x, spare=False):
        hidden = torch.tanh(self.first(x))
        return self.second(hidden) + (self.spare(hidden) if spare else 0.0)


class Tied(Uneven):
    """A parameter that two layers share."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.second.weight = self.spare.weight

    def forward(self, x, spare=False):
        return super().forward(x, spare=True)


class Repeated(Uneven):
    """A layer that is called twice."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.middle = nn.Linear(7, 7, dtype=dtype)

    def forward(self, x, spare=False):
        hidden = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return self.second(torch.tanh(self.middle(hidden))) + self.spare(hidden)


class Checkpointed(Uneven):
    def forward(self, x, spare=False):
        hidden = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
        return torch.utils.checkpoint.checkpoint(self.second, torch.tanh(hidden), use_reentrant=False)


class Even(nn.Module):
    """Weights that can be sharded along their second dimension."""

    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(5, 8, bias=False, dtype=dtype)
        self.second = nn.Linear(8, 4, bias=False, dtype=dtype)

    def forward(self, x, spare=False):
        return self.second(torch.tanh(self.first(x)))


def sharded_pair(dtype=torch.float32, policy=None, shape=None, whole=False, kind=Uneven, together=False, **keywords):
    """A model under FSDP2 beside a plain copy."""
    plain = kind(dtype)
    model = copy.deepcopy(plain)
    names = ("replicate", "shard") if shape else ("shard",)
    mesh = init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)
    keywords |= {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    layers = [] if whole else [model.first, model.second]
    if hasattr(model, "middle"):
        layers.append(model.middle)
    for module in (*([layers] if together else layers), model):
        fully_shard(module, **keywords)
    return model, plain


def batch(size, seed, dtype):
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    return torch.randn(size, 5, generator=generator).to(dtype)


def compare_norms(
    plain, model, sizes, dtype, *, reduced_every=1, spare=False, tamper=None, average_replicas_late=False, size_type=int
):
    """Relative errors of the probe's |g_k|² and of |ḡ|² against the plain copy, and what the row says."""
    probe = ShardedProbe()
    probe.begin(0, 1, model, MeasuredParameters([p for p in model.parameters() if p.requires_grad]))
    weight = 1.0 / len(sizes)
    sums = []
    for index, size in enumerate(sizes):
        x = batch(size, index, dtype)
        model.set_requires_gradient_sync((index + 1) % reduced_every == 0)
        if average_replicas_late:
            model.set_requires_all_reduce(index == len(sizes) - 1)
        probe.before_backward()
        (weight * model(x, spare).square().sum(1).mean()).backward()
        probe.after_backward(size_type(size), weight, None)
        loss = plain(x, spare).square().sum(1).mean()
        grads = torch.autograd.grad(loss, list(plain.parameters()), allow_unused=True)
        sums.append(torch.cat([torch.zeros(0) if g is None else g.flatten() for g in grads]).double())
    if tamper is not None:
        tamper(model)
    samples = probe.finish(None, full=True)
    row = samples.to_row()
    dist.all_reduce(row)
    probe.detach()
    windows = [torch.stack(sums[start : start + reduced_every]) for start in range(0, len(sizes), reduced_every)]
    expected = [window.mean(0).square().sum() for window in windows]
    mean = torch.stack(sums).mean(0)
    dist.all_reduce(mean)
    mean_sq = (mean / dist.get_world_size()).square().sum()
    outcome = measurement_from_row(row.tolist(), 0.02)
    return {
        "samples": float((samples.sq_norms / torch.stack(expected) - 1.0).abs().max()),
        "mean": float((row[_GRAD_SQ_NORM] / dist.get_world_size() / mean_sq - 1.0).abs()),
        "sizes": [float(size) for size in samples.sizes],
        "checked": samples.checksums is not None and bool(samples.checksums.abs().max() > 0),
        "outcome": "measured" if isinstance(outcome, Measurement) else outcome.name,
        "comms": comms(model),
    }


def comms(model):
    """Class of the reduce-scatter of each group."""
    states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
    return [type(group._reduce_scatter_comm).__name__ for state in states for group in state._fsdp_param_groups]
