"""Scenarios of FSDP2 without Lightning, for ranks that are connected already; each returns what JSON can hold."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.sharded_pairs import Checkpointed, Even, Repeated, Tied, Uneven, batch, comms, compare_norms, sharded_pair
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_wn.noise_scale.measured_parameters import MeasuredParameters, find_measured
from lightning_wn.probes.fsdp2.groups import read_sharded_groups, require_optimized
from lightning_wn.probes.sharded import ShardedProbe


def sentence(call):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is checked by the test
        call()
    return str(caught.value)


def exact(folder):
    results = {}
    reduced = {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
        "float64": torch.float64,
    }
    shapes = {"shard": None} if dist.get_world_size() == 2 else {"shard": None, "hybrid": (2, 2)}
    for kind, shape in shapes.items():
        for name, reduce_dtype in reduced.items():
            policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
            model, plain = sharded_pair(policy=policy, shape=shape)
            results[f"{kind} {name}"] = compare_norms(plain, model, [4, 4], torch.float32)
        model, plain = sharded_pair(torch.float64, shape=shape)
        results[f"{kind} all float64"] = compare_norms(plain, model, [4, 4], torch.float64)
    return results


def exact_options(folder):
    results = {}
    for name, reduce_dtype, factor, only_sums in (
        ("forced sums", None, None, True),
        ("divided by 6 in float64", torch.float64, 6.0, False),
        ("divided by 6 with forced sums", None, 6.0, True),
        ("divided by 0.5 in float16", torch.float16, 0.5, False),
    ):
        model, plain = sharded_pair(policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(only_sums)
                if factor is not None:
                    module.set_gradient_divide_factor(factor)
        results[name] = compare_norms(plain, model, [4, 4], torch.float32)
    model, plain = sharded_pair()
    results["windows"] = compare_norms(plain, model, [4, 4, 4, 4], torch.float32, reduced_every=2)
    model, plain = sharded_pair()
    results["ragged window"] = compare_norms(plain, model, [2, 6], torch.float32, reduced_every=2)
    model, plain = sharded_pair()
    results["windows of sizes on the device"] = compare_norms(
        plain, model, [4, 4, 4, 4], torch.float32, reduced_every=2, size_type=torch.tensor
    )
    model, plain = sharded_pair()
    results["unreduced"] = compare_norms(plain, model, [4], torch.float32, reduced_every=2)
    model, plain = sharded_pair(whole=True)
    results["one group, unused layer"] = compare_norms(plain, model, [4, 4], torch.float32)
    model, plain = sharded_pair(whole=True)
    results["one group"] = compare_norms(plain, model, [4, 4], torch.float32, spare=True)
    model, plain = sharded_pair()
    model.second.requires_grad_(False)
    plain.second.requires_grad_(False)
    plain.parameters = lambda: (p for p in nn.Module.parameters(plain) if p.requires_grad)
    results["frozen layer"] = compare_norms(plain, model, [4, 4], torch.float32)
    model, plain = sharded_pair()

    def double(model):
        model.first.weight.grad.mul_(2.0)

    results["edited gradient"] = compare_norms(plain, model, [4, 4], torch.float32, tamper=double)
    return results


def exact_models(folder):
    from torch.distributed.tensor import Shard

    results = {}
    for name, keywords in {
        "tied": {"kind": Tied, "whole": True},
        "called twice": {"kind": Repeated},
        "called twice in one group": {"kind": Repeated, "whole": True},
        "checkpointed": {"kind": Checkpointed},
        "two layers in one group": {"together": True},
        "second dimension": {
            "kind": Even,
            "shard_placement_fn": lambda p: Shard(1) if p.shape == (4, 8) else Shard(0),
        },
        "kept whole after forward": {"reshard_after_forward": False},
    }.items():
        model, plain = sharded_pair(**keywords)
        results[name] = compare_norms(plain, model, [4, 4], torch.float32)
    return results


def exact_groups(folder):
    """Columns of |g_k|² and |ḡ|² for a part of the parameters and for groups, beside the plain copy's."""
    results = {}
    for name, keywords, layers in (
        ("groups", {}, None),
        ("a part", {}, ["second", "first.bias"]),
        ("one group of FSDP2", {"whole": True}, None),
        ("float64", {"dtype": torch.float64}, None),
        ("reduced in float64", {"policy": MixedPrecisionPolicy(reduce_dtype=torch.float64)}, "*.weight"),
    ):
        dtype = keywords.get("dtype", torch.float32)
        model, plain = sharded_pair(**keywords)
        chosen = {"layers": layers, "groups": {"weights": "*.weight", "second": "second"}}
        probe = ShardedProbe()
        probe.begin(0, 1, model, find_measured(model, list(model.parameters()), **chosen))
        expected = find_measured(plain, list(plain.parameters()), **chosen)
        samples, total = [], [torch.zeros_like(p, dtype=torch.float64) for p in expected.parameters]
        one = torch.ones((), dtype=torch.float64)
        for index in range(2):
            x = batch(4, index, dtype)
            probe.before_backward()
            (model(x, spare=True).square().sum(1).mean() / 2).backward()
            probe.after_backward(4, 0.5, None)
            loss = plain(x, spare=True).square().sum(1).mean()
            gradients = [g.double() for g in torch.autograd.grad(loss, expected.parameters)]
            samples.append(expected.sq_norms_of(gradients, one))
            torch._foreach_add_(total, gradients, alpha=0.5 / dist.get_world_size())
        for gradient in total:
            dist.all_reduce(gradient)
        found = probe.finish(None, full=True)
        probe.detach()
        mean = found.grad_sq_norm / dist.get_world_size()
        dist.all_reduce(mean)
        results[name] = {
            "samples": float((found.sq_norms / torch.stack(samples) - 1.0).abs().max()),
            "mean": float((mean / expected.sq_norms_of(total, one) - 1.0).abs().max()),
            "columns": list(found.sq_norms.shape),
            "comms": comms(model),
        }
    return results


def exact_hybrid(folder):
    """Replicas that are averaged only in the last backward pass, and collectives with a group of their own."""
    model, plain = sharded_pair(shape=(2, 2))
    late = compare_norms(plain, model, [4, 4], torch.float32, average_replicas_late=True)
    model, plain = sharded_pair(shape=(2, 2))
    model.set_separate_reduce_scatter_group()
    for module in (model.first, model.second):
        module.set_allocate_memory_from_process_group_for_comm(True)
    return {"late": late, "own group": compare_norms(plain, model, [4, 4], torch.float32)}


def irregular(folder):
    """Several backward passes taken for one, and groups that reduce at different times."""
    model, _ = sharded_pair()
    probe = ShardedProbe()
    probe.begin(0, 1, model, MeasuredParameters(list(model.parameters())))
    probe.before_backward()
    for seed in (0, 1):
        model(batch(4, seed, torch.float32)).square().mean().backward()
    probe.after_backward(4, 1.0, None)
    several = probe.finish(None, full=True).irregular
    probe.detach()

    model, _ = sharded_pair()
    probe = ShardedProbe()
    probe.begin(0, 1, model, MeasuredParameters(list(model.parameters())))
    for synced in (False, True):
        model.first.set_requires_gradient_sync(synced)
        probe.before_backward()
        model(batch(4, 0, torch.float32)).square().mean().backward()
        probe.after_backward(4, 0.5, None)
    apart = probe.finish(None, full=True).irregular
    probe.detach()
    return [several, apart]


class UsersReduceScatter:
    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)


def attach_and_detach(folder):
    """Two probes over each other, closed in either order; a reduce-scatter set by the user in between."""
    said = []
    for first_out in (0, 1):
        model, _ = sharded_pair()
        probes = [ShardedProbe(), ShardedProbe()]
        for probe in probes:
            probe.begin(0, 1, model, MeasuredParameters(list(model.parameters())))
        attached = comms(model)
        for probe in (probes[first_out], probes[1 - first_out]):
            probe.detach()
        said.append([attached, comms(model)])
    model, _ = sharded_pair()
    originals = [g._reduce_scatter_comm for g in model.first._get_fsdp_state()._fsdp_param_groups]
    probe = ShardedProbe()
    probe.begin(0, 1, model, MeasuredParameters(list(model.parameters())))
    model.second.set_custom_reduce_scatter(UsersReduceScatter())
    probe.detach()
    probe.detach()
    restored = [g._reduce_scatter_comm for g in model.first._get_fsdp_state()._fsdp_param_groups]
    said.append([comms(model), originals[0] is restored[0]])
    return said


def refused_probes(folder):
    def begin(model):
        return sentence(
            lambda: ShardedProbe().begin(
                0, 1, model, MeasuredParameters([p for p in model.parameters() if p.requires_grad])
            )
        )

    own, _ = sharded_pair()
    own.second.set_custom_reduce_scatter(UsersReduceScatter())
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
    whole = fully_shard(Uneven(None), mesh=mesh)
    ignored = Uneven(None)
    fully_shard(ignored, mesh=mesh["replicate"], ignored_params=set(ignored.spare.parameters()))
    partly, _ = sharded_pair()
    without = sentence(lambda: require_optimized(partly, read_sharded_groups(partly), list(partly.first.parameters())))

    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

    first = FSDPMeshInfo(mesh["replicate"], shard_mesh_dim=0)
    second = FSDPMeshInfo(DeviceMesh.from_group(dist.new_group(), "cpu"), shard_mesh_dim=0)
    several = fully_shard(
        Uneven(None),
        mesh=mesh["replicate"],
        shard_placement_fn=lambda p: ShardPlacementResult(None, first if p.ndim == 1 else second),
    )
    return {
        "no module": begin(Uneven(None)),
        "own reduce-scatter": begin(own),
        "own is left": comms(own),
        "shard size 1": begin(whole),
        "ignored": begin(ignored),
        "not in the optimizer": without,
        "several groups": begin(several),
    }


def refused_tensor_parallel_layers(folder):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = Uneven(None)
    model.first = nn.Linear(6, 8)
    model.second = nn.Linear(8, 4)
    del model.spare
    parallelize_module(model, mesh["tensor"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    part = fully_shard(Uneven(None), mesh=mesh["data"])
    return [
        sentence(lambda: ShardedProbe().begin(0, 1, model, MeasuredParameters(list(model.parameters())))),
        sentence(lambda: ShardedProbe().begin(0, 1, part, MeasuredParameters(list(part.parameters())))),
    ]
