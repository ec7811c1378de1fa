"""Rewrite layers as w = v · (g/‖v‖) in place, and fold them back into plain weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_wn.module_selectors import ModuleSelection
from lightning_wn.weight_norm.checkpoint.state_dict import add_state_hooks, remove_state_hooks
from lightning_wn.weight_norm.core.cache import forget
from lightning_wn.weight_norm.core.layers import LayerRule, rule_for
from lightning_wn.weight_norm.core.mean_only_batch_norm import fold_mean
from lightning_wn.weight_norm.core.module_class import compute_through_class
from lightning_wn.weight_norm.core.normalized_module import (
    g_and_v,
    has_plain_weight,
    normalized_weights,
    plain_order,
    plain_weight,
    reshard,
    set_parameters,
    sort,
)
from lightning_wn.weight_norm.core.parametrization import UnitLayout, WeightNorm, decompose
from lightning_wn.weight_norm.core.selection import NamedLayer, select
from lightning_wn.weight_norm.core.torch_weight_norm import (
    legacy_g_and_v,
    legacy_hooks,
    legacy_weight,
    put_first,
    remove_compatibility_hook,
    remove_legacy,
    torch_normalized_weights,
)
from lightning_wn.weight_norm.sharing import require_owners_alike

Dim: TypeAlias = Literal["output"] | None
"""What has a norm of its own: each output unit, or each weight."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def apply_weight_norm(
    module: nn.Module, modules: ModuleSelection | None = None, *, exclude: ModuleSelection = (), dim: Dim = "output"
) -> list[str]:
    """Reparametrize the weights of a model as w = g · v/‖v‖, in place (arXiv 1602.07868, section 2).

    Each weight becomes two Parameters, ``parametrizations.weight.original0`` (g, the length of each output
    unit) and ``parametrizations.weight.original1`` (v, its direction), from which ``weight`` is computed
    whenever it is read. The weights do not change by this, bit for bit. Call it before an optimizer is built:
    the old Parameters are no longer the model's.

    What is one unit: a row for Linear and Embedding, an output channel for convolutions and transposed
    convolutions, with groups too. g has the rank of the weight, with the units on the output dimension:
    (out, 1) for Linear, (out, 1, 1, 1) for Conv2d, (1, out, 1, 1) for ConvTranspose2d.

    Other layers, named in ``modules``, have several weights: LSTM, GRU, RNN and their cells those of inputs,
    hidden numbers and projections, of all layers and directions, with each gate of each hidden number for a
    unit; MultiheadAttention the projections of queries, keys and values, and its ``out_proj``. Of a Bilinear,
    each output is a unit. A lazy layer has to be built first, by running a batch through the model.

    A layer whose weight is already computed (parametrized by anyone, pruned, or under torch's older
    weight-norm and spectral-norm hooks) is left alone. A weight that several selected layers share stays
    shared; type, device, memory format and ``requires_grad`` are kept. A zero unit starts at g = 0 with a
    fixed random direction, so that it is zero now and learns later.

    Args:
        module: The model, or a single layer.
        modules: What to normalize. None means Linear, Conv1-3d and ConvTranspose1-3d. Otherwise a type
            (``nn.Embedding``, or the dotted path of an imported class, "torch.nn.Embedding"), a glob matched
            against whole qualified names ("decoder.*"; ``*`` matches dots too), a predicate
            ``(name, module) -> bool``, or a list of these: a layer is selected if any entry selects it.
            Modules without a matrix of their own, such as containers, activations and normalization layers,
            are passed over; one that has a matrix and is not supported, such as an EmbeddingBag, is an error.
        exclude: What to leave alone, said in the same ways.
        dim: "output" gives each output unit a length of its own; None gives each weight one, a scalar g.

    Returns:
        The qualified names of the layers that were rewritten, in the order of the model. A second call finds
        nothing left to do and returns an empty list.

    Raises:
        TypeError: If an entry of ``modules`` or ``exclude`` is of a wrong type.
        ValueError: If an entry matches nothing, a selected layer cannot be normalized, or ``dim`` is neither. The
            model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.ones(1, 4)
        >>> before = model(x)
        >>> apply_weight_norm(model, exclude="2")
        ['0']
        >>> model[0].parametrizations.weight.original0.shape
        torch.Size([8, 1])
        >>> torch.equal(model(x), before)
        True
    """
    reshard(module)
    selection = select(module, modules, exclude)
    if selection.misses:
        raise ValueError(" ".join(selection.misses))
    return rewrite(module, selection.layers, dim)


def fold_weight_norm(module: nn.Module) -> list[str]:
    """Replace the g and v of every weight-normalized layer by the plain weight they stand for, in place.

    This folds what :func:`apply_weight_norm` or :class:`~lightning_wn.WeightNormCallback` made,
    and what others made with torch, in both spellings: ``torch.nn.utils.parametrizations.weight_norm`` and
    the older ``torch.nn.utils.weight_norm``, on any tensor and any ``dim``. The weights do not change by
    this, bit for bit, and the layers get back their class and their parameters; type, device, ``training``
    and ``requires_grad`` are kept (it is set if g or v has it). Layers that share g and v share one weight
    again: fold the whole model then, not one of the layers. Running means of mean-only batch normalization
    go into the biases. Other parametrizations are left alone.

    A folded model is a plain one for ``torch.export``, TorchScript, ONNX and pickle.

    Args:
        module: The model, or a single layer.

    Returns:
        The qualified names of the layers that were folded.

    Raises:
        ValueError: If another parametrization was registered on top of a normalized weight, or the
            parameters are sharded. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 2)))
        >>> apply_weight_norm(model)
        ['0']
        >>> fold_weight_norm(model)
        ['0', '1']
        >>> type(model[0]).__name__, [name for name, _ in model[1].named_parameters()]
        ('Linear', ['weight', 'bias'])
    """
    reshard(module)
    return fold(NamedLayer((name,), layer) for name, layer in module.named_modules())


def plain_tensors(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of a supported module that are Parameters of their own."""
    rule = rule_for(module)
    return tuple(n for n in rule.tensors(module) if has_plain_weight(module, n)) if rule is not None else ()


def check_dim(dim: Dim) -> None:
    """Raise unless this says what has a norm of its own."""
    if dim not in ("output", None):
        raise ValueError(
            f'`dim` got {dim!r}, but it must be "output", which gives each output unit a length of its own, or None, '
            "which gives each weight one."
        )


def rewrite(root: nn.Module, layers: Iterable[NamedLayer], dim: Dim = "output") -> list[str]:
    """Reparametrize these layers of a model; those whose weight is already computed are left alone.

    Args:
        root: The model, in which other owners of the weights are looked for.
        layers: The layers, all of supported types.
        dim: See :func:`apply_weight_norm`.

    Returns:
        The names of the layers that were rewritten.

    Raises:
        ValueError: If one of the layers cannot be rewritten. The model is then as it was.
    """
    check_dim(dim)
    weights = [(layer, tensor) for layer in layers for tensor in plain_tensors(layer.module)]
    todo = [(layer, tensor, _require_supported(layer, tensor, dim)) for layer, tensor in weights]
    require_owners_alike(root, weights)
    for layer, tensor, layout in todo:
        _require_representable(layer, tensor, layout)

    shared: dict[int, tuple[Tensor, Tensor]] = {}
    done: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for layer, tensor, layout in todo:
            done.append((layer.module, tensor, plain_weight(layer.module, tensor)))
            _install(layer.module, tensor, layout, shared)
            _rule(layer.module).after_rewriting(layer.module)
    except BaseException:
        for module, tensor, weight in reversed(done):
            if not has_plain_weight(module, tensor):
                _uninstall(module, tensor, weight)
                _rule(module).after_folding(module)
        raise
    return list(dict.fromkeys(layer.name for layer, _ in weights))


def fold(layers: Iterable[NamedLayer]) -> list[str]:
    """Fold these layers, as far as they are weight-normalized by anyone: see :func:`fold_weight_norm`."""
    todo = [(layer, weights) for layer in layers if (weights := _foldable_weights(layer.module))]
    for layer, weights in todo:
        for weight in weights:
            if reason := weight.refusal():
                raise ValueError(f"{layer} {reason}")
    folded: dict[tuple[int, int], nn.Parameter] = {}
    for layer, weights in todo:
        for weight in weights:
            g, v = weight.g_and_v()
            if (id(g), id(v)) not in folded:
                trainable = g.requires_grad or v.requires_grad
                folded[id(g), id(v)] = nn.Parameter(weight.compute(), requires_grad=trainable)
            weight.replace(folded[id(g), id(v)])
        fold_mean(layer.module)
    return [layer.name for layer, _ in todo]


@dataclass(frozen=True)
class _FoldableWeight:
    """One normalized weight of a module, about to be folded."""

    module: nn.Module
    name: str
    normalized: parametrize.ParametrizationList | None  # None under the older hook of torch

    def refusal(self) -> str | None:
        if self.normalized is not None and len(self.normalized) > 1:
            return (
                "has another parametrization on top of its weight normalization, which cannot be folded from "
                "under it: remove that one first with `torch.nn.utils.parametrize.remove_parametrizations`."
            )
        if any(isinstance(tensor, DTensor) for tensor in self.g_and_v()):
            return (
                "is sharded, and its class is no longer its own: fold a model that is not, loaded from a "
                'checkpoint of this one (`checkpoint="parametrized"`).'
            )
        return None

    def g_and_v(self) -> tuple[Tensor, Tensor]:
        return legacy_g_and_v(self.module, self.name) if self.normalized is None else g_and_v(self.normalized)

    @torch.no_grad()
    def compute(self) -> Tensor:
        # not `module.weight`, which may come from a scope that keeps it
        weight = legacy_weight(self.module, self.name) if self.normalized is None else self.normalized()
        return cast(Tensor, weight).detach()

    def replace(self, weight: nn.Parameter) -> None:
        if self.normalized is None:
            remove_legacy(self.module, self.name, weight)
            return
        _uninstall(self.module, self.name, weight)
        if (rule := rule_for(self.module)) is not None:
            rule.after_folding(self.module)
        if not torch_normalized_weights(self.module):
            remove_compatibility_hook(self.module)


def _foldable_weights(module: nn.Module) -> list[_FoldableWeight]:
    by_name = {**normalized_weights(module), **torch_normalized_weights(module), **dict.fromkeys(legacy_hooks(module))}
    return [_FoldableWeight(module, name, normalized) for name, normalized in by_name.items()]


def _rule(module: nn.Module) -> LayerRule:
    rule = rule_for(module)
    assert rule is not None  # `select` returns supported types only
    return rule


def _require_supported(layer: NamedLayer, tensor: str, dim: Dim) -> UnitLayout:
    module, rule = layer.module, _rule(layer.module)
    if reason := rule.refusal(module) or _tensor_refusal(module, plain_weight(module, tensor)):
        raise ValueError(f"{layer} cannot be weight-normalized: {reason}.")
    return UnitLayout(per_tensor=True) if dim is None else rule.layout(module)


def _require_representable(layer: NamedLayer, tensor: str, layout: UnitLayout) -> None:
    try:
        decompose(plain_weight(layer.module, tensor), layout)
    except ValueError as error:
        raise ValueError(f"{layer} cannot be weight-normalized: {error}.") from None


def _tensor_refusal(module: nn.Module, weight: nn.Parameter) -> str | None:
    if weight.is_meta and not hasattr(module, "reset_parameters"):
        return (
            "its weight is on the meta device, without values, and the class has no `reset_parameters` that "
            "would give it some: materialize it first, or exclude the layer"
        )
    return _weight_refusal(weight)


def _weight_refusal(weight: nn.Parameter) -> str | None:
    if is_lazy(weight):
        return (
            "its weight has no shape yet: run one batch through the model first, in a LightningModule at the end of "
            "`__init__` or in `configure_model`, or exclude the layer"
        )
    if isinstance(weight, DTensor):
        return (
            "its weight is a DTensor, sharded already: call `apply_weight_norm(self)` in `configure_model`, before "
            "`fully_shard`, or exclude the layer"
        )
    if type(weight) is not nn.Parameter:
        return (
            f"its weight is a {type(weight).__name__}, and only plain Parameters are supported, not "
            "quantized ones: quantize after folding, or exclude the layer"
        )
    if weight.dtype not in _DTYPES:
        return f"its weight is of type {weight.dtype}, and only real floating point works: exclude the layer"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return (
            "its weight has gradient hooks, which would never fire again: register them after the rewriting, "
            "or exclude the layer"
        )
    return None


def _install(module: Any, tensor: str, layout: UnitLayout, shared: dict[int, tuple[Tensor, Tensor]]) -> None:
    weight = plain_weight(module, tensor)
    weight_norm = WeightNorm(layout)
    weight_norm.replaced = weakref.ref(weight)
    weight_norm.order = plain_order(module)
    if parametrize.is_parametrized(module):
        _give_own_class(module)
    parametrize.register_parametrization(module, tensor, weight_norm)
    # torch builds the containers around it in training mode
    module.parametrizations.train(module.training)
    compute_through_class(module, tensor)
    add_state_hooks(module)
    normalized = normalized_weights(module)[tensor]
    if id(weight) in shared:
        normalized.original0, normalized.original1 = shared[id(weight)]
    shared[id(weight)] = g_and_v(normalized)


def _uninstall(module: Any, tensor: str, weight: nn.Parameter) -> None:
    """Give the module this plain weight in place of its parametrization.

    torch's ``remove_parametrizations`` makes a buffer of a frozen weight, puts the weight behind the bias,
    and deletes the property from a class that deep copies of the module share.
    """
    is_ours = tensor in normalized_weights(module)
    order = plain_order(module)
    remove_state_hooks(module)
    forget(module)
    plain_class = type(module).__bases__[0]
    del module.parametrizations[tensor]
    if len(module.parametrizations) == 0:
        del module.parametrizations
        module.__class__ = plain_class
    else:
        _give_own_class(module, without=tensor)
        if normalized_weights(module):
            add_state_hooks(module)
    module.register_parameter(tensor, weight)
    if is_ours:
        set_parameters(module, sort(module._parameters, order))
    else:
        put_first(module, tensor)


def _give_own_class(module: nn.Module, without: str | None = None) -> None:
    """Give the module a copy of its parametrized class: its deep copies share that class with it."""
    cls = type(module)
    members = {key: value for key, value in vars(cls).items() if key not in (without, "__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, members)
