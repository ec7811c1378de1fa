"""The g and v that travel beside the plain weights of a checkpoint, so that resuming is exact.

A checkpoint's ``state_dict`` is the truth; g and v are used where they are those of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_wn.weight_norm.cache import forget
from lightning_wn.weight_norm.chains import g_and_v, is_sharded, weight_norm_chains, weight_norm_in

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
    seen = set()
    for prefix, layer in module.named_modules(remove_duplicate=False):
        if prefix.endswith("parametrizations") or id(layer) in seen:
            continue
        for name, chain in weight_norm_chains(layer).items():
            seen.add(id(layer))
            if not is_sharded(chain):
                # an averaged model holds the model as `module`
                yield f"{prefix}.{name}".removeprefix("module.").removeprefix("."), chain


def collect(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return g and v of the layers that save plain weights, by the name that the weight has in the model."""
    return {
        name: (g.detach(), v.detach())
        for name, chain in named_chains(module)
        if weight_norm_in(chain).saved_as_weight
        for g, v in [g_and_v(chain)]
    }


@torch.no_grad()
def restore(module: nn.Module, candidates: Iterable[Parts]) -> list[str]:
    """Give layers back the g and v that their present weights were saved with.

    Args:
        module: The model, with the weights of the checkpoint.
        candidates: What :func:`collect` returned, of this model first.

    Returns:
        The names of weights that have g and v in the first of the candidates, but of another weight.
    """
    mismatches = []
    candidates = list(candidates)
    for name, chain in named_chains(module):
        weight_norm = weight_norm_in(chain)
        target_g, target_v = g_and_v(chain)
        now = weight_norm(target_g, target_v)
        known = [parts[name] for parts in candidates if name in parts]
        for saved in known:
            g, v = (part.to(target) for part, target in zip(saved, (target_g, target_v), strict=True))
            if g.shape == target_g.shape and v.shape == target_v.shape and _same(weight_norm(g, v), now):
                target_g.copy_(g)
                target_v.copy_(v)
                break
        else:
            mismatches += [name] if known else []
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
                    f"The checkpoint holds g and v of {', '.join(mismatches[:3])} that are not those of its weights, "
                    "as if these had been edited. The weights were loaded, with a new g and v: the optimizer's "
                    "state for them is of others."
                )
        if last:
            self.forget()

    def forget(self) -> None:
        """Give up what was loaded."""
        self._loaded = None

    @staticmethod
    def _copies(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        return model_copies(pl_module, callbacks)
