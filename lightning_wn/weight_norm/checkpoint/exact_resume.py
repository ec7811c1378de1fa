"""The g and v that travel beside the plain weights of a checkpoint, so that resuming is exact.

So do bias and running mean of mean-only batch normalization, of which the bias in the file is the difference.
A checkpoint's ``state_dict`` is the truth; g and v are used where they are those of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

from lightning_wn.text import some
from lightning_wn.trainer import callbacks_of
from lightning_wn.weight_norm.core.cache import forget
from lightning_wn.weight_norm.core.mean_only_batch_norm import folded_bias, mean_only_of
from lightning_wn.weight_norm.core.normalized_module import (
    g_and_v,
    is_sharded,
    weight_norm_chains,
    weight_norm_in,
    weight_norm_of,
)

KEY = "weight_norm"
"""Where a checkpoint has them: a dict of copies of the model, each a dict of tensors by name."""

Parts = Mapping[str, tuple[Tensor, Tensor]]


def model_copies(model: nn.Module, callbacks: Iterable[Callback]) -> dict[str, nn.Module]:
    """Return the model and the copies of it that callbacks keep, such as its average, by a name for each.

    Example:
        >>> list(model_copies(nn.Linear(2, 2), []))
        ['model']
    """
    copies = {"model": model}
    for callback in callbacks:
        for name, value in vars(callback).items():
            if isinstance(value, nn.Module) and value is not model:
                copies[f"{callback.state_key}.{name}"] = value
    return copies


def named_chains(module: nn.Module) -> Iterator[tuple[str, ParametrizationList]]:
    """Yield every weight that is computed here, by its name in the model; not those that are sharded."""
    for prefix, layer in _named_layers(module):
        for name, chain in weight_norm_chains(layer).items():
            if not is_sharded(chain):
                yield f"{prefix}{name}", chain


def _named_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each normalized layer once, with the prefix of what is in it."""
    seen = set()
    for prefix, layer in module.named_modules(remove_duplicate=False):
        if prefix.endswith("parametrizations") or id(layer) in seen or not weight_norm_chains(layer):
            continue
        seen.add(id(layer))
        # an averaged model holds the model as `module`
        yield f"{prefix}.".removeprefix("module.").removeprefix("."), layer


@dataclass(frozen=True)
class _Joined:
    """Two tensors of a model of which a file may hold one: g and v, or a bias and a running mean.

    Attributes:
        first: g, or the bias.
        second: v, or the mean.
        join: Computes what the file holds.
        saved_as_one: Whether it holds that, and not the two.
        kind: What they are called.
    """

    first: Tensor
    second: Tensor
    join: Callable[[Tensor, Tensor], Tensor]
    saved_as_one: bool
    kind: str


def _named_pairs(module: nn.Module) -> Iterator[tuple[str, _Joined]]:
    for name, chain in named_chains(module):
        weight_norm = weight_norm_in(chain)
        yield name, _Joined(*g_and_v(chain), weight_norm, weight_norm.saved_as_weight, "g and v")
    for prefix, layer in _named_layers(module):
        mean_only, weight_norm_of_layer = mean_only_of(layer), weight_norm_of(layer)
        bias = layer._parameters.get("bias")
        if mean_only is None or weight_norm_of_layer is None or bias is None or isinstance(bias, DTensor):
            continue
        as_one = weight_norm_of_layer.saved_as_weight
        yield f"{prefix}bias", _Joined(bias, mean_only.running_mean, folded_bias, as_one, "b and running mean")


def collect(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return g and v of the layers that save plain weights, by the name that the weight has in the model.

    Where a running mean is saved in the bias, the two are under the name of the bias.
    """
    return {
        name: (pair.first.detach(), pair.second.detach()) for name, pair in _named_pairs(module) if pair.saved_as_one
    }


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
        targets = pair.first, pair.second
        now = pair.join(*targets)
        known = [parts[name] for parts in candidates if name in parts]
        for saved in known:
            if [part.shape for part in saved] != [target.shape for target in targets]:
                continue
            parts = [part.to(target) for part, target in zip(saved, targets, strict=True)]
            if _same(pair.join(*parts), now):
                for target, part in zip(targets, parts, strict=True):
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


class ExactResume:
    """Saves g and v with a checkpoint, and gives them back after everyone has loaded weights from it.

    Callbacks that keep a copy of the model may load theirs, and the model's, after ours was called, so that
    g and v are given back more than once: at once, and until the first batch.

    Example:
        >>> resume = ExactResume()
        >>> resume.load({"state_dict": {}})
        >>> resume.forget()
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Parts] | None = None

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put g and v under a key of the checkpoint, if it holds plain weights."""
        found = {label: collect(copy) for label, copy in self._copies(trainer, pl_module).items()}
        if found := {label: parts for label, parts in found.items() if parts}:
            checkpoint.setdefault(KEY, {}).update(found)

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Remember what :meth:`save` put there."""
        self._loaded = checkpoint.get(KEY)

    def restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last: bool = False) -> None:
        """Set g and v of the model and its copies to those of the weights that they have."""
        if self._loaded is None:
            return
        for label, copy in self._copies(trainer, pl_module).items():
            others = [parts for other, parts in self._loaded.items() if other != label]
            mismatches = restore(copy, [self._loaded.get(label, {}), *others])
            if last and label == "model" and mismatches:
                rank_zero_warn(
                    f"The checkpoint holds {some(mismatches)} that are not those of its weights, as if these had been "
                    "edited. The weights were loaded, with a new g and v: the optimizer's state for them is of others."
                )
        if last:
            self.forget()

    def forget(self) -> None:
        """Give up what was loaded."""
        self._loaded = None

    @staticmethod
    def _copies(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        callbacks = callbacks_of(trainer)
        return model_copies(pl_module, callbacks)
