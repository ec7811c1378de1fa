"""Do the optimizers hold the Parameters that the rewritten layers have now?"""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

from lightning_wn.weight_norm.chains import g_and_v, weight_norm_chains, weight_norm_in
from lightning_wn.weight_norm.selection import NamedLayer
from lightning_wn.weight_norm.wording import some


def check_optimizers(optimizers: Iterable[Optimizer], layers: Iterable[NamedLayer]) -> None:
    """Raise unless optimizers and weight-normalized layers hold the same Parameters, both ways.

    No optimizer may hold a weight that g and v took the place of, and each trainable g and v must be in some
    optimizer. Parameters of an optimizer that belong to no module, such as a learned loss weight kept
    elsewhere, are legal and none of its business; so is a run in which no optimizer holds anything.

    Args:
        optimizers: All optimizers of the run.
        layers: The selected layers; those that this package does not normalize are passed over.

    Raises:
        ValueError: If the two differ, with the names of the layers and the fix.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_wn import weight_norm
        >>> layer = nn.Linear(2, 3)
        >>> early = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> _ = weight_norm.apply_weight_norm(layer)
        >>> check_optimizers([early], [NamedLayer(("",), layer)])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: An optimizer holds the plain weight of Linear, which weight normalization has replaced...
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if not held:
        return
    stale, missing = [], []
    for layer in layers:
        for tensor, chain in weight_norm_chains(layer.module).items():
            weight_norm = weight_norm_in(chain)
            owner = str(layer) if tensor == "weight" else f"{tensor} of {layer}"
            replaced = weight_norm.replaced() if weight_norm.replaced is not None else None
            if replaced is not None and id(replaced) in held:
                stale.append(owner)
            missing += [
                f"{letter} of {owner}"
                for letter, parameter in zip("gv", g_and_v(chain), strict=True)
                if parameter.requires_grad and id(parameter) not in held
            ]
    if stale:
        raise ValueError(
            f"An optimizer holds the plain weight of {some(stale)}, which weight normalization has "
            "replaced, so that the layer would not train: collect the parameters inside "
            "`configure_optimizers`, and not in `__init__`, where they are not yet g and v."
        )
    if missing:
        raise ValueError(
            f"No optimizer holds the trainable {some(missing)}: if parameters are grouped by name, let the "
            'group of "weight" also take names that contain "parametrizations.weight" (g is `original0`, v '
            "is `original1`); if the layer is left out on purpose, add it to `exclude` or set "
            "`requires_grad_(False)` on it."
        )
