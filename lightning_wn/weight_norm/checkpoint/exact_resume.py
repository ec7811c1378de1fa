"""The g and v that travel beside the plain weights of a checkpoint, so that resuming is exact.

So do bias and running mean of mean-only batch normalization, of which the bias in the file is the difference.
A checkpoint's ``state_dict`` is the truth; g and v are used where they are those of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_wn.weight_norm.core.cache import forget
from lightning_wn.weight_norm.core.mean_only_batch_norm import folded_bias, mean_only_of
from lightning_wn.weight_norm.core.normalized_module import (
    g_and_v,
    named_normalized_layers,
    named_normalized_weights,
    weight_norm_in,
    weight_norm_of,
)

KEY = "weight_norm"
"""Where a checkpoint has them: a dict of copies of the model, each a dict of tensors by name."""

Parts = Mapping[str, tuple[Tensor, Tensor]]


class _Pair(NamedTuple):
    """g and v, or a bias and a running mean: two tensors of a model of which a file may hold what they make."""

    tensors: tuple[Tensor, Tensor]
    join: Callable[[Tensor, Tensor], Tensor]
    is_saved_joined: bool
    kind: str


def _named_pairs(module: nn.Module) -> Iterator[tuple[str, _Pair]]:
    for name, normalized in named_normalized_weights(module):
        weight_norm = weight_norm_in(normalized)
        yield name, _Pair(g_and_v(normalized), weight_norm, weight_norm.saved_as_weight, "g and v")
    for prefix, layer in named_normalized_layers(module):
        mean_only, weight_norm_of_layer = mean_only_of(layer), weight_norm_of(layer)
        bias = layer._parameters.get("bias")
        if mean_only is None or weight_norm_of_layer is None or bias is None or isinstance(bias, DTensor):
            continue
        is_saved_joined = weight_norm_of_layer.saved_as_weight
        yield f"{prefix}bias", _Pair((bias, mean_only.running_mean), folded_bias, is_saved_joined, "b and running mean")


def collect(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return g and v of the layers that save plain weights, by the name that the weight has in the model.

    Where a running mean is saved in the bias, the two are under the name of the bias.
    """
    pairs = {name: pair.tensors for name, pair in _named_pairs(module) if pair.is_saved_joined}
    return {name: (first.detach(), second.detach()) for name, (first, second) in pairs.items()}


@torch.no_grad()
def restore(module: nn.Module, candidates: Iterable[Parts]) -> list[str]:
    """Give layers back the g and v that their present weights were saved with, and biases theirs.

    Args:
        module: The model, with the weights of the checkpoint.
        candidates: What :func:`collect` returned, of this model first.

    Returns:
        What is in the candidates, but of other weights than the model has, in words.
    """
    mismatches = []
    candidates = list(candidates)
    for name, pair in _named_pairs(module):
        now = pair.join(*pair.tensors)
        known = [parts[name] for parts in candidates if name in parts]
        for saved in known:
            if [part.shape for part in saved] != [target.shape for target in pair.tensors]:
                continue
            parts = [part.to(target) for part, target in zip(saved, pair.tensors, strict=True)]
            if _same(pair.join(*parts), now):
                for target, part in zip(pair.tensors, parts, strict=True):
                    target.copy_(part)
                break
        else:
            mismatches += [f"{pair.kind} of {name}"] if known else []
    for layer in module.modules():
        forget(layer)
    return mismatches


def _same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two computations of one weight differ by rounding only, as on two kinds of devices."""
    close = 4 * torch.finfo(first.dtype).eps
    return torch.allclose(first, second, rtol=close, atol=close * float(second.abs().max()))
