"""Data-dependent initialization: g and b from the first batch that runs through the model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_wn.weight_norm.core.cache import forget, set_aside
from lightning_wn.weight_norm.core.forward import call_forward
from lightning_wn.weight_norm.core.mean_only_batch_norm import gives_pre_activations, mean_only_of, unit_dim
from lightning_wn.weight_norm.core.normalized_module import g_and_v, is_sharded, normalized_weights, weight_norm_of
from lightning_wn.weight_norm.core.selection import NamedLayer
from lightning_wn.weight_norm.unit_moments import UnitMoments, gather_ranks, pool_moments, unit_moments

_G = "parametrizations.weight.original0"
_OTHERWISE = 'name the layer in `exclude`, or take `init="keep"`'


@dataclass(frozen=True)
class InitializationReport:
    """What the first batch did, as the names of layers in the order of the model.

    Attributes:
        initialized: Layers whose g or b was set.
        frozen: Layers that the batch reached and whose g does not require gradients.
        unreached: Layers that could have been initialized and were not called.
    """

    initialized: tuple[str, ...]
    frozen: tuple[str, ...]
    unreached: tuple[str, ...]


def can_initialize(module: nn.Module) -> bool:
    """Tell whether a layer is weight-normalized and one that data-dependent initialization knows.

    These are Linear, Bilinear, convolutions and transposed convolutions. An Embedding has no pre-activation,
    and recurrent weights and attention's projections are used inside one call of their layer. With
    ``dim=None`` one g cannot set the variances of several units.
    """
    weight_norm = weight_norm_of(module)
    return weight_norm is not None and not weight_norm.layout.per_tensor and gives_pre_activations(module)


class DataDependentInitialization:
    r"""Set g and b so that each unit's pre-activation has mean 0 and variance 1 on one batch.

    This is section 3 of Salimans & Kingma, arXiv 1602.07868: with t = v · x/‖v‖, g = 1/σ[t] and b = -μ[t]/σ[t].
    Mean and (biased) variance are taken over the batch and all positions: space for convolutions, time and all
    other leading dimensions for Linear; and over the batches of all ranks.

    Inside the ``with`` block, the model is run once. Hooks in front of its layers do the rest while the batch
    passes, so that a later layer sees what the initialized earlier ones compute, and nothing is computed twice
    but the layers' own products. Random states, other modules' buffers and gradients are not touched.

    - A layer that is called several times is set by its first call.
    - Without a bias only g is set: the variance is 1, and the mean stays where it is.
    - A unit that is constant on the batch keeps g, and its mean is brought to 0.
    - If g is frozen, the layer is left alone; if b is frozen, only g is set. A g or b that several layers share
      is set by the first of them.
    - Moments are computed in float32 at least, autocast or not.
    - If the block is left by an exception, g and b are as they were.

    Args:
        layers: The model, or some of its layers by name; those of which :func:`can_initialize` is false are passed
            over.

    Raises:
        ValueError: If the parameters are sharded; in the model's forward pass, if a unit has fewer than two values on
            all ranks together, if its values are not finite, or if a layer of the user's own computes something
            else than a pre-activation.

    Example:
        >>> from lightning_wn.weight_norm import apply_weight_norm
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> _ = apply_weight_norm(model)
        >>> with DataDependentInitialization(model) as init:
        ...     y = model(x)
        >>> init.report().initialized
        ('0', '2')
        >>> bool(y.mean(0).abs().max() < 1e-6), bool((y.var(0, correction=0) - 1).abs().max() < 1e-5)
        (True, True)
    """

    def __init__(self, layers: nn.Module | Iterable[NamedLayer]) -> None:
        if isinstance(layers, nn.Module):
            layers = [NamedLayer((name,), module) for name, module in layers.named_modules()]
        self._layers = [layer for layer in layers if can_initialize(layer.module)]
        for layer in self._layers:
            if is_sharded(normalized_weights(layer.module)["weight"]):
                raise ValueError(
                    f"Data-dependent initialization cannot set {layer}, whose parameters are sharded: inside a forward "
                    "pass they are copies. Initialize before sharding, by running a batch through the model in "
                    '`DataDependentInitialization`, or take `init="keep"`.'
                )
        self._handles: dict[int, RemovableHandle] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._reached: dict[int, bool] = {}
        self._runs_eagerly = False

    def __enter__(self) -> Self:
        """Attach."""
        self.attach()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Detach, and undo everything after an exception."""
        self.detach()
        if kind is not None:
            self.restore()

    def attach(self) -> None:
        """Put a hook in front of each layer that no batch has reached."""
        self.detach()
        # a compiled model ignores hooks: let this batch run without compilation
        if "torch._dynamo" in sys.modules:
            _EAGER.begin()
            self._runs_eagerly = True
        for layer in self._layers:
            if id(layer.module) not in self._reached:
                self._handles[id(layer.module)] = layer.module.register_forward_pre_hook(
                    lambda module, args, kwargs, layer=layer: self._before_call(layer, args, kwargs), with_kwargs=True
                )

    def detach(self) -> None:
        """Take all hooks away."""
        if self._runs_eagerly:
            _EAGER.end()
            self._runs_eagerly = False
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    @torch.no_grad()
    def restore(self) -> None:
        """Give every g, b and running mean back its value."""
        for tensor, value in self._before.values():
            tensor.copy_(value)
        self._before, self._reached = {}, {}

    def report(self) -> InitializationReport:
        """Say which layers were set, and which were not."""

        def names(*states: bool | None) -> tuple[str, ...]:
            return tuple(layer.name for layer in self._layers if self._reached.get(id(layer.module)) in states)

        return InitializationReport(names(True), names(False), names(None))

    @torch.no_grad()
    def _before_call(self, layer: NamedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._handles.pop(id(layer.module)).remove()
        module = layer.module
        g, _ = _g_and_v(module)
        self._reached[id(module)] = g.requires_grad
        if not g.requires_grad:
            return
        bias = module._parameters.get("bias")
        neutral = {_G: torch.ones_like(g)} | ({} if bias is None else {"bias": torch.zeros_like(bias)})
        moments, noise = _measure(layer, neutral, args, kwargs)
        _require_variance(layer, moments)

        length = g if id(g) in self._before else _gain(layer, moments, noise)
        self._set(g, length)
        # what a scope of the user's may hold
        forget(module)
        mean = moments.mean * length.flatten().to(moments.mean.dtype)
        if (mean_only := mean_only_of(module)) is not None:
            # which takes the mean away itself, and keeps b in its place
            self._set(mean_only.running_mean, mean)
            mean = torch.zeros_like(mean)
        if bias is not None and bias.requires_grad and id(bias) not in self._before:
            self._set(bias, -mean)
        if _has_own_forward(module):
            _require_scaling_with_g(layer, moments, noise, args, kwargs)

    def _set(self, tensor: Tensor, value: Tensor) -> None:
        self._before.setdefault(id(tensor), (tensor, tensor.clone()))
        tensor.copy_(value)


def _g_and_v(module: nn.Module) -> tuple[Tensor, Tensor]:
    return g_and_v(normalized_weights(module)["weight"])


def _gain(layer: NamedLayer, moments: UnitMoments, noise: Tensor) -> Tensor:
    g, _ = _g_and_v(layer.module)
    deviation = moments.variance.sqrt()
    varies = deviation > noise
    length = torch.where(varies, deviation.masked_fill(~varies, 1.0).reciprocal(), g.flatten().to(deviation.dtype))
    length = length.to(g.dtype).view(g.shape)
    if not bool(torch.isfinite(length).all()):
        raise ValueError(
            f"Data-dependent initialization of {layer} takes a g beyond the range of {g.dtype}, because its inputs "
            f"hardly vary on the first batch: scale them up, {_OTHERWISE}."
        )
    return length


def _require_variance(layer: NamedLayer, moments: UnitMoments) -> None:
    count = int(moments.count)
    if count < 2:
        raise ValueError(
            f"Data-dependent initialization takes a variance over the first batch, but each unit of {layer} has "
            f"{count} value{'s' * (count != 1)} there, and it takes two: use a larger batch, {_OTHERWISE}."
        )
    if not bool(torch.isfinite(moments.mean).all() and torch.isfinite(moments.squares).all()):
        raise ValueError(
            f"Data-dependent initialization found NaN or infinite values in the pre-activations of {layer} on the "
            f"first batch: look at the batch and at the layers before, {_OTHERWISE}."
        )


def _require_scaling_with_g(
    layer: NamedLayer, moments: UnitMoments, noise: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """See that a forward method of the user's own scales with g."""
    g, _ = _g_and_v(layer.module)
    length = g.flatten().abs().to(moments.mean.dtype)
    expected = moments.variance.sqrt() * length
    after, _ = _measure(layer, {}, args, kwargs)
    # half types round g to 1/256
    if bool(((after.variance.sqrt() - expected).abs() > 0.02 * expected + noise * length).any()):
        raise _not_a_pre_activation(layer)


def _not_a_pre_activation(layer: NamedLayer) -> ValueError:
    return ValueError(
        f"Data-dependent initialization cannot set {layer}, because its own `forward` computes something else than a "
        "pre-activation per unit, such as an activation function on top: move that into a module of its own, "
        f"{_OTHERWISE}."
    )


def _measure(
    layer: NamedLayer, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[UnitMoments, Tensor]:
    """Run a layer's forward method with other tensors in the place of some of its own.

    Returns:
        The moments of its output over all ranks, and the standard deviation below which a unit with a direction
        of length 1 cannot be told from a constant one, for rounding.
    """
    module = layer.module
    _, v = _g_and_v(module)
    wide = torch.promote_types(v.dtype, torch.float32)

    def widen(tensor: Tensor) -> Tensor:
        return tensor.to(wide) if tensor.is_floating_point() else tensor

    args, kwargs = tree_map_only(Tensor, widen, (args, dict(kwargs)))
    own = {name: widen(tensor) for name, tensor in module.named_parameters()}
    # clones: a forward method of the user's own may count its calls in them
    own |= {name: widen(tensor.clone()) for name, tensor in module.named_buffers()}
    own |= {name: widen(tensor) for name, tensor in tensors.items()}
    with _aside(module, v.device), set_aside(module):
        output = call_forward(module, own, args, kwargs)

    units = _g_and_v(module)[0].numel()
    dim = unit_dim(module)
    if not isinstance(output, Tensor) or output.ndim < -dim or output.shape[dim] != units:
        raise _not_a_pre_activation(layer)
    local = unit_moments(output.to(wide), dim)
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
    peaks = [t.abs().max() for t in inputs if t.numel()]
    peak = torch.stack(peaks).prod() if isinstance(module, nn.Bilinear) and peaks else max(peaks, default=local.count)
    ranks = gather_ranks(torch.cat([local.count.view(1), peak.view(1).to(local.mean), local.mean, local.squares]))
    moments = pool_moments(ranks[:, 0], ranks[:, 2 : 2 + units], ranks[:, 2 + units :])
    # a sum of n products, of which those of v have squares that add up to 1, is at most √n times the peak
    noise = 4 * torch.finfo(wide).eps * ranks[:, 1].max() * (v.numel() / units) ** 0.5
    return moments, noise


class _Eager:
    """Models run without compilation from the first begin to the last end, in whatever order these come."""

    def __init__(self) -> None:
        self._running = 0
        self._stance = ExitStack()

    def begin(self) -> None:
        if self._running == 0:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._running += 1

    def end(self) -> None:
        self._running -= 1
        if self._running == 0:
            self._stance.close()


# of the process, as torch's stance is
_EAGER = _Eager()


@contextmanager
def _aside(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute in full precision; leave random states and what torch caches as they are."""
    devices = [device] if device.type == "cuda" else []
    cache = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng(devices, enabled=_has_own_forward(module)),
        ):
            yield
    finally:
        parametrize._cache_enabled, parametrize._cache = cache


def _has_own_forward(module: nn.Module) -> bool:
    """Tell whether the layer computes something of its user's own making."""
    if "forward" in vars(module):
        return True
    methods = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
    return not all(m is None or m.__module__.startswith("torch.nn.modules.") for m in methods)
