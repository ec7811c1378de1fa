"""What a probe must know about the FSDP2 parameter groups of a model, and which models it cannot read.

FSDP2 has a public setter for the reduce-scatter but no getter for it, for the mesh or for the gradient's
divide factor. All that is read behind its public face is read here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn

from lightning_wn.text import some

_LOW_PRECISION = (torch.float16, torch.bfloat16)
# reduced with the division inside the collective; every other type is divided before and after it
_DIVIDED_IN_COLLECTIVE = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class ShardedGroup:
    """One FSDP2 parameter group: its gradients go through one reduce-scatter.

    Attributes:
        name: Name of its module, for messages.
        module: The ``FSDPModule``, which has the public setter of the reduce-scatter.
        torch_group: torch's own record of the group.
        shard_size: Ranks that share one copy of the parameters.
        shard_rank: Which of these shards is this rank's.
        replicas: Copies of the parameters (hybrid sharding), 1 otherwise.
    """

    name: str
    module: Any
    torch_group: Any
    shard_size: int
    shard_rank: int
    replicas: int

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable sharded parameters, in the order of the flat gradient."""
        return [p.sharded_param for p in self.torch_group.fsdp_params if p.sharded_param.requires_grad]

    @property
    def padded_shard_lengths(self) -> list[int]:
        """Elements that each of ``parameters`` takes in each of the ``shard_size`` rows of the flat gradient."""
        lengths = []
        for parameter in self.parameters:
            dim: int = next(p.dim for p in parameter.placements if p.is_shard())  # type: ignore[attr-defined]  # a DTensor
            # uneven shards are padded, which torch allows along the first dimension only
            length = parameter.shape[dim]
            lengths.append(math.ceil(length / self.shard_size) * (parameter.numel() // max(length, 1)))
        return lengths

    @property
    def flat_length(self) -> int:
        """Elements of the flat gradient where every trainable parameter has one."""
        return self.shard_size * sum(self.padded_shard_lengths)

    @property
    def reduce_scatter(self) -> Any:
        """The reduce-scatter in use."""
        return self.torch_group._reduce_scatter_comm

    def set_reduce_scatter(self, comm: Any) -> None:
        """Set another reduce-scatter."""
        self.module.set_custom_reduce_scatter(comm)

    @property
    def device(self) -> torch.device:
        """Where gradients are computed and reduced; offloaded parameters lie elsewhere."""
        return torch.device(self.torch_group.device)

    @property
    def mean_factor(self) -> float:
        """What the optimizer's gradient must be multiplied by to be the mean over the data-parallel ranks."""
        return self._divide_factor / (self.shard_size * self.replicas)

    def pre_division(self, flat_grad: Tensor, op: Any) -> float:
        """Return by what the input of the reduce-scatter was divided beforehand.

        Types that overflow easily, and float64 with them, are divided by a power of two near the square
        root of the divide factor before the collective and by the rest after it
        (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, ``_get_gradient_divide_factors``).

        Args:
            flat_grad: The input of the reduce-scatter.
            op: Its reduction.
        """
        if flat_grad.dtype in _DIVIDED_IN_COLLECTIVE or op != torch.distributed.ReduceOp.SUM:
            return 1.0
        factor, before = self._divide_factor, 1.0
        while factor % before == 0 and factor / before > before:
            before *= 2
        return before

    @property
    def _divide_factor(self) -> float:
        # the user may set another at any time
        factor = self.torch_group.gradient_divide_factor
        return float(self.shard_size * self.replicas if factor is None else factor)


def read_sharded_groups(model: nn.Module) -> list[ShardedGroup]:
    """Return the FSDP2 parameter groups of a model, or say in one sentence why they cannot be measured.

    Raises:
        ValueError: Without an ``FSDPModule``, with several parameter groups in one module, where parameters are
            not sharded, and where a mesh has other dimensions or covers only some of the ranks.
    """
    modules = _fsdp_modules(model)
    if not modules:
        raise ValueError(
            f"The 'sharded' probe reads the reduce-scatter of FSDP2, and {type(model).__name__} has no FSDP2 module; "
            "call `torch.distributed.fsdp.fully_shard` on its layers in `configure_model()`, or use DDP."
        )
    groups = []
    seen: set[int] = set()
    for name, module in modules:
        if not hasattr(module, "set_custom_reduce_scatter"):
            raise ValueError(
                f"The 'sharded' probe needs `FSDPModule.set_custom_reduce_scatter`, which torch {torch.__version__} "
                "does not have; install a newer torch, or use DDP."
            )
        state = module._get_fsdp_state()
        if id(state) in seen:  # `fully_shard([a, b])` is one group of two modules
            continue
        seen.add(id(state))
        torch_groups = _torch_groups(state)
        if len(torch_groups) > 1:
            raise ValueError(
                f"FSDP2 shards {name} over several meshes (`shard_placement_fn` returned a `ShardPlacementResult`), "
                "and allows no custom reduce-scatter there; shard all parameters of a module over one mesh."
            )
        groups += [_read_group(name, module, torch_group) for torch_group in torch_groups]
    return groups


def require_sharded(model: nn.Module, groups: Sequence[ShardedGroup], parameters: Sequence[nn.Parameter]) -> None:
    """Raise ValueError where an FSDP2 group has not all of the optimizer's parameters."""
    sharded = {id(parameter) for group in groups for parameter in group.parameters}
    if outside := {id(parameter) for parameter in parameters} - sharded:
        raise ValueError(
            f"The optimizer holds {len(outside)} parameter(s) that no FSDP2 module shards "
            f"({_names(outside, model)}), and the 'sharded' probe cannot see their gradients; call "
            "`fully_shard` on the root module too and do not pass them as `ignored_params`."
        )


def require_optimized(model: nn.Module, groups: Sequence[ShardedGroup], parameters: Sequence[nn.Parameter]) -> None:
    """Raise ValueError where the optimizer lacks a trainable parameter of a group."""
    sharded = {id(parameter) for group in groups for parameter in group.parameters}
    if without := sharded - {id(parameter) for parameter in parameters}:
        raise ValueError(
            f"FSDP2 reduces the gradients of {len(without)} trainable parameter(s) that the optimizer does not hold "
            f"({_names(without, model)}); pass them to the optimizer or set `requires_grad=False` on them."
        )


def require_torchs_reduce_scatter(groups: Sequence[ShardedGroup]) -> None:
    """Raise ValueError where the user has set a reduce-scatter of their own."""
    for group in groups:
        comm = group.reduce_scatter
        # what torch sets itself is of a class that torch defines; two callbacks may set ours one over the other
        if not type(comm).__module__.startswith(("torch.", "lightning_wn.")):
            raise ValueError(
                f"The 'sharded' probe reads gradients through `set_custom_reduce_scatter`, and {group.name} already "
                f"has your own ({type(comm).__name__}), which it would replace; remove one of the two."
            )


def reduces_in_low_precision(groups: Sequence[ShardedGroup]) -> bool:
    """Whether a group computes or reduces gradients in 16 bits, which loosens how well checksums can agree."""
    policies = [group.torch_group.mp_policy for group in groups]
    dtypes = {dtype for policy in policies for dtype in (policy.param_dtype, policy.reduce_dtype)}
    return not dtypes.union(p.dtype for group in groups for p in group.parameters).isdisjoint(_LOW_PRECISION)


def sharded_data_parallel_size(strategy: Strategy) -> int:
    """Return how many ranks have batches of their own under ``ModelParallelStrategy``.

    Raises:
        ValueError: Under another strategy, and where tensor-parallel ranks share their batch.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            f"The 'sharded' probe reads FSDP2 under ModelParallelStrategy, and the strategy is "
            f"{type(strategy).__name__}; use `strategy=ModelParallelStrategy(...)`, or `probe='auto'`."
        )
    data_parallel = int(strategy.device_mesh["data_parallel"].size())
    tensor_parallel = int(strategy.device_mesh["tensor_parallel"].size())
    if tensor_parallel > 1:
        ranks = data_parallel * tensor_parallel
        raise ValueError(
            f"ModelParallelStrategy gives each batch to {tensor_parallel} tensor-parallel ranks (that is its default), "
            "and the 'sharded' probe needs a batch of its own for every rank; set `ModelParallelStrategy("
            f"data_parallel_size={ranks}, tensor_parallel_size=1)`."
        )
    return data_parallel


def require_shardable(trainer: Trainer, pl_module: LightningModule) -> list[ShardedGroup]:
    """Check, once model and optimizer are set up, that the 'sharded' probe can measure this run.

    Returns:
        The parameter groups that it will read.

    Raises:
        ValueError: With one sentence that says what to change.
    """
    ranks = sharded_data_parallel_size(trainer.strategy)
    if ranks < 2:
        raise ValueError(
            "The 'sharded' probe compares ranks, and there is one; use `probe='auto'` on a single device, or set "
            "`ModelParallelStrategy(data_parallel_size=...)` to two or more."
        )
    groups = read_sharded_groups(pl_module)
    require_torchs_reduce_scatter(groups)
    in_optimizers = [p for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]]
    trainable = [p for p in in_optimizers if p.requires_grad]
    require_sharded(pl_module, groups, trainable)
    require_optimized(pl_module, groups, trainable)
    return groups


def _fsdp_modules(model: nn.Module) -> list[tuple[str, Any]]:
    try:
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - torch may be built without distributed
    except ImportError:
        return []
    return [
        (repr(name) if name else "the root module", module)
        for name, module in model.named_modules()
        if isinstance(module, FSDPModule)
    ]


def _torch_groups(state: Any) -> list[Any]:
    # one group a module in older versions
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _read_group(name: str, module: Any, torch_group: Any) -> ShardedGroup:
    mesh_info = torch_group.mesh_info
    shard_size = int(getattr(mesh_info, "shard_mesh_size", 1))
    replicas = int(getattr(mesh_info, "replicate_mesh_size", 1))
    ranks = torch.distributed.get_world_size()
    if any(p.sharded_param.device_mesh.size() != shard_size * replicas for p in torch_group.fsdp_params):
        raise ValueError(
            f"The parameters of {name} lie on a mesh with a further dimension (tensor parallelism), whose ranks "
            "share their batch, and the 'sharded' probe needs a batch of its own for every rank; shard over "
            "data-parallel dimensions only."
        )
    if shard_size < 2:
        raise ValueError(
            f"FSDP2 keeps {name} whole on every rank (shard size 1) and then calls no reduce-scatter that the "
            "'sharded' probe could read; pass `fully_shard` a mesh that shards over two or more ranks, such as "
            "`mesh=self.device_mesh['data_parallel']`, or use DDP."
        )
    if shard_size * replicas != ranks:
        raise ValueError(
            f"FSDP2 averages the gradients of {name} over {shard_size * replicas} of {ranks} ranks, and the "
            "'sharded' probe needs one average over all; pass `fully_shard` a mesh of all data-parallel ranks."
        )
    return ShardedGroup(name, module, torch_group, shard_size, int(mesh_info.shard_mesh_rank), replicas)


def _names(ids: set[int], model: nn.Module) -> str:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return some(sorted(repr(names.get(i, "unnamed")) for i in ids))
