"""Mean-only batch normalization: a layer's outputs without their mean over the batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from lightning_wn.module_selectors import ModuleSelection
from lightning_wn.text import some
from lightning_wn.weight_norm.core.normalized_module import g_and_v, is_sharded, normalized_weights
from lightning_wn.weight_norm.core.selection import NamedLayer, select

NAME = "mean_only_batch_norm"
"""The name of the submodule that a layer gets."""


class MeanOnlyBatchNorm(nn.Module):
    r"""Subtract each feature's mean over the batch, and leave its variance alone.

    Mean-only batch normalization of Salimans & Kingma, arXiv 1602.07868, section 4: in training
    t̃ = t - μ[t] + b, with μ over the batch and all positions; in evaluation the running mean takes the place
    of μ. With a weight-normalized layer in front the variance is already under control, and the gradient is
    less noisy than batch normalization's.

    Args:
        num_features: The number of features.
        dim: Their dimension: 1 for (batch, features, ...), -1 for (..., features).
        momentum: How far a running mean moves towards the mean of each batch, in (0, 1].
        synchronize: Whether means are taken over the batches of all ranks, at the cost of one small all-reduce
            in the forward pass and one in the backward pass. Otherwise each rank subtracts its own.

    Shape:
        Input and output: any shape with ``num_features`` on ``dim``.

    Raises:
        ValueError: If an argument is out of range; in training, if a feature has fewer than two values, of which
            nothing but b would be left.

    Example:
        >>> layer = MeanOnlyBatchNorm(2)
        >>> layer(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        tensor([[-1.,  0.],
                [ 1.,  0.]])
        >>> layer.running_mean
        tensor([0.2000, 0.5000])
        >>> layer.eval()(torch.zeros(1, 2))
        tensor([[-0.2000, -0.5000]])
    """

    running_mean: Tensor

    def __init__(self, num_features: int, *, dim: int = 1, momentum: float = 0.1, synchronize: bool = False) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"`num_features` got {num_features}, but it must be at least 1.")
        check_momentum("momentum", momentum)
        self.num_features = num_features
        self.dim = dim
        self.momentum = momentum
        self.synchronize = synchronize
        self.register_buffer("running_mean", torch.zeros(num_features))

    def forward(self, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """Subtract the means.

        Args:
            values: The values to center.
            bias: What was added to each feature on purpose: it is no part of the mean, and stays.

        Returns:
            The centered values, of the shape and type of ``values``.
        """
        if values.shape[self.dim] != self.num_features:
            raise ValueError(
                f"The input's dimension {self.dim} has {values.shape[self.dim]} features, but MeanOnlyBatchNorm was "
                f"built for {self.num_features}."
            )
        mean = self._batch_mean(values, bias) if self.training else self.running_mean
        shape = [1] * values.ndim
        shape[self.dim] = self.num_features
        return values - mean.view(shape).to(values.dtype)

    def reset_parameters(self) -> None:
        """Begin again with means of 0; also how a module without values gets them."""
        self.running_mean.zero_()

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.num_features}, dim={self.dim}, momentum={self.momentum}, synchronize={self.synchronize}"

    def _batch_mean(self, values: Tensor, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(values.dtype, torch.float32)
        rows = values.movedim(self.dim, 0).reshape(self.num_features, -1)
        total = rows.sum(1, dtype=wide)
        count = total.new_tensor(rows.shape[1])
        if self.synchronize and distributed.is_available() and distributed.is_initialized():
            row = torch.cat([total, count.unsqueeze(0)])
            ranks: Tensor = cast(Any, _SumOverRanks).apply(row)
            total, count = ranks[:-1], ranks[-1].detach()
        # asks the device only where it may matter
        if rows.shape[1] < 2 and count < 2:
            raise ValueError(
                f"MeanOnlyBatchNorm got {int(count)} value{'s' * (int(count) != 1)} per feature in training, and "
                "subtracting their mean leaves nothing of it: use a larger batch, or drop the last, short one."
            )
        mean = total / count if bias is None else total / count - bias
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        return mean


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks whose gradient, too, is summed: every rank's loss depends on every rank's values."""

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        return _all_reduce(row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_reduce(grad)


def _all_reduce(row: Tensor) -> Tensor:
    total = row.clone()
    distributed.all_reduce(total)
    return total


def add_mean_only_batch_norm(
    module: nn.Module,
    modules: ModuleSelection | None = None,
    *,
    exclude: ModuleSelection = (),
    momentum: float = 0.1,
    synchronize: bool = False,
) -> list[str]:
    """Put a :class:`MeanOnlyBatchNorm` behind weight-normalized layers of a model, in place.

    The layer keeps its name, its calls and its ``bias``, which now stands for the mean of its outputs; a
    submodule ``mean_only_batch_norm`` holds the running mean, and a forward hook runs it. In evaluation the
    running means, which start at 0, are subtracted. :func:`~lightning_wn.weight_norm.fold_weight_norm` brings
    them into the bias, for inference.

    Args:
        module: The model, or a single layer.
        modules: Which of the weight-normalized layers, said as for
            :func:`~lightning_wn.weight_norm.apply_weight_norm`. Linear, Bilinear, convolutions and transposed
            convolutions can have one; other layers are passed over, and so is the output projection of
            MultiheadAttention, which is never called.
        exclude: What to leave alone.
        momentum: See :class:`MeanOnlyBatchNorm`.
        synchronize: See :class:`MeanOnlyBatchNorm`.

    Returns:
        The names of the layers that were given one.

    Raises:
        TypeError: If an entry of ``modules`` or ``exclude`` is of a wrong type.
        ValueError: If an entry matches nothing, an argument is out of range, a layer is sharded already,
            or layers share a bias. The model is then as it was.

    Example:
        >>> from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = apply_weight_norm(model)
        >>> add_mean_only_batch_norm(model, exclude="2")
        ['0']
        >>> y = model(torch.ones(16, 4))
        >>> y = model.eval()(torch.ones(3, 4))
        >>> _ = fold_weight_norm(model)
        >>> torch.allclose(model(torch.ones(3, 4)), y, atol=1e-6)
        True
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    selection = select(module, modules, exclude)
    if selection.misses:
        raise ValueError(" ".join(selection.misses))
    return attach(selection.layers, momentum=momentum, synchronize=synchronize)


def attach(layers: Iterable[NamedLayer], *, momentum: float, synchronize: bool) -> list[str]:
    """Put a :class:`MeanOnlyBatchNorm` behind these layers: see :func:`add_mean_only_batch_norm`."""
    check_momentum("momentum", momentum)
    todo = without_mean_only(layers)
    _require_biases_apart(todo)
    for layer in todo:
        module: Any = layer.module
        weight = g_and_v(normalized_weights(module)["weight"])[1]
        mean_only = MeanOnlyBatchNorm(
            module.out_channels if isinstance(module, _ConvNd) else module.out_features,
            dim=unit_dim(module),
            momentum=momentum,
            synchronize=synchronize,
        )
        mean_only.to(weight.device, torch.promote_types(weight.dtype, torch.float32)).train(module.training)
        module.add_module(NAME, mean_only)
        module.register_forward_hook(_center)
    return [layer.name for layer in todo]


def _require_biases_apart(layers: Iterable[NamedLayer]) -> None:
    owners: dict[int, NamedLayer] = {}
    for layer in layers:
        if is_sharded(normalized_weights(layer.module)["weight"]):
            raise ValueError(
                f"{layer} is sharded already, and its own hooks run after those of sharding: call "
                "`add_mean_only_batch_norm(self)` in `configure_model`, before `fully_shard`, or leave it out."
            )
        bias = layer.module._parameters.get("bias")
        if bias is not None and owners.setdefault(id(bias), layer) is not layer:
            raise ValueError(
                f"{owners[id(bias)]} and {layer} share one bias, which cannot take the running means of both when "
                "they are folded: give each a bias of its own, or exclude one of them."
            )


def can_have_one(module: nn.Module) -> bool:
    """Tell whether a layer is weight-normalized and its calls give pre-activations, one per unit."""
    if not gives_pre_activations(module):
        return False
    return "weight" in normalized_weights(module) and not parametrize.is_parametrized(module, "bias")


def without_mean_only(layers: Iterable[NamedLayer]) -> list[NamedLayer]:
    """Return those layers that can have a mean-only batch normalization and have none."""
    return [layer for layer in layers if can_have_one(layer.module) and mean_only_of(layer.module) is None]


def gives_pre_activations(module: nn.Module) -> bool:
    """Tell whether calls of this type of layer give one linear combination of the inputs per unit.

    The output projection of MultiheadAttention, a Linear of its own kind, is read and never called.
    """
    is_only_read = isinstance(module, NonDynamicallyQuantizableLinear)
    return isinstance(module, (nn.Linear, nn.Bilinear, _ConvNd)) and not is_only_read


def mean_only_of(module: nn.Module) -> MeanOnlyBatchNorm | None:
    """Return the mean-only batch normalization behind a layer, if it has one."""
    found = module._modules.get(NAME)
    return found if isinstance(found, MeanOnlyBatchNorm) else None


def unit_dim(module: nn.Module) -> int:
    """Return the dimension of a layer's output that holds its units, counted from the end."""
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1


def fold_mean(module: nn.Module) -> None:
    """Bring the running mean of a layer into its bias, and take the normalization away."""
    mean_only = mean_only_of(module)
    if mean_only is None:
        return
    for key, hook in list(module._forward_hooks.items()):
        if hook is _center:
            del module._forward_hooks[key]
    del module._modules[NAME]
    bias, mean = module._parameters.get("bias"), mean_only.running_mean
    folded = -mean.to(cast(Tensor, module.weight).dtype) if bias is None else folded_bias(bias, mean)
    module.register_parameter("bias", nn.Parameter(folded, requires_grad=bias is None or bias.requires_grad))


def folded_bias(bias: Tensor, mean: Tensor) -> Tensor:
    """Return the bias that makes up for the running mean that is no longer subtracted."""
    return (bias.detach() - mean).to(bias.dtype)


def fold_mean_of_state(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Bring the running mean of a layer's entries in a state dict into its bias, for a layer that has none.

    A layer that has no bias either cannot take it: its entries stay, for the strict check of names to find.
    """
    if mean_only_of(module) is None:
        _fold_in_state(state_dict, prefix)


def save_mean_in_bias(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Let a state dict of a layer hold the bias that the folded layer would have, and no running mean."""
    if mean_only_of(module) is not None:
        _fold_in_state(state_dict, prefix)


def load_mean_from_bias(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Let a layer with running means load a state dict that has none, such as the plain model's.

    Where the bias in the file is the one that the layer would fold to, bias and running mean are left alone. Any
    other is taken as it is, with a running mean of 0: in evaluation the layer computes what the file's did.
    """
    mean_only = mean_only_of(module)
    mean, bias = _mean_and_bias(prefix)
    own = module._parameters.get("bias")
    if mean_only is None or own is None or isinstance(own, DTensor) or mean in state_dict or bias not in state_dict:
        return
    running = mean_only.running_mean
    if not running.is_meta and torch.equal(state_dict[bias].to(own), folded_bias(own, running)):
        state_dict |= {mean: running, bias: own.detach()}
    else:
        state_dict[mean] = torch.zeros_like(running, device=state_dict[bias].device)


def drop_missing_means(missing: list[str]) -> None:
    """Do not report the running mean of a layer as missing whose bias is missing, too: plain layers have only that."""
    for key in [key for key in missing if key.endswith(f"{NAME}.running_mean")]:
        if f"{key.removesuffix(f'{NAME}.running_mean')}bias" in missing:
            missing.remove(key)


def require_biases(layers: Iterable[NamedLayer], where: str, fix: str) -> None:
    """Raise if the running mean of a layer has no bias to be folded into.

    Args:
        layers: The selected layers.
        where: What the layers would do without their means, such as to be saved.
        fix: Another way than a bias.
    """
    bare = [layer for layer in layers if can_have_one(layer.module) and layer.module.bias is None]
    if bare:
        raise ValueError(
            f"{some(bare)} would {where} without the mean that mean-only batch normalization subtracts, because there "
            f"is no bias to fold it into: build with `bias=True`, {fix}, or exclude these layers."
        )


def require_mean_only(layers: Iterable[NamedLayer]) -> None:
    """Raise if a layer that can have a mean-only batch normalization has none."""
    if late := without_mean_only(layers):
        raise ValueError(
            f"{some(late)} would train without mean-only batch normalization, because it came into the model "
            "after the callback's `setup`: build layers in `__init__` or `configure_model`, or end "
            "`LightningModule.setup` with `apply_weight_norm(self)` and `add_mean_only_batch_norm(self)`."
        )


def check_momentum(argument: str, momentum: float) -> None:
    """Raise unless this is a share of the way to go, above 0."""
    if not 0 < momentum <= 1:
        raise ValueError(
            f"`{argument}` got {momentum}, but it must be above 0 and at most 1: 0.1 moves a running mean by a tenth "
            "of the way to each batch's."
        )


def _center(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """The forward hook of a layer; a function of this module, so that the layer can be copied."""
    mean_only = mean_only_of(module)
    assert mean_only is not None
    return mean_only(output, module.bias)  # type: ignore[no-any-return] # a Module's call is untyped


def _fold_in_state(state_dict: dict[str, Tensor], prefix: str) -> None:
    mean, bias = _mean_and_bias(prefix)
    if mean in state_dict and bias in state_dict:
        state_dict[bias] = folded_bias(state_dict[bias], state_dict.pop(mean))


def _mean_and_bias(prefix: str) -> tuple[str, str]:
    return f"{prefix}{NAME}.running_mean", f"{prefix}bias"
