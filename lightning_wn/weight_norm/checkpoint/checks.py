"""Does a checkpoint fit a weight-normalized model? Said in a sentence, before anything is changed by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_wn.text import some
from lightning_wn.weight_norm.checkpoint.exact_resume import KEY
from lightning_wn.weight_norm.checkpoint.keys import StoredWeight, find_weight
from lightning_wn.weight_norm.core.normalized_module import g_and_v, named_normalized_weights


def require_same_shapes(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Raise if a weight to be normalized is of another shape: a pre-hook of ``load_state_dict``.

    torch finds that out when it has loaded the other layers already.
    """
    problems = []
    for name, normalized in named_normalized_weights(module):
        stored = _find(state_dict, f"{prefix}{name}")
        shape = g_and_v(normalized)[1].shape
        # what is missing is legal in a load that is not strict, which a hook cannot know
        if stored is not None and stored.shape != shape:
            problems.append(f"{name!r} has the shape {tuple(stored.shape)}, not {tuple(shape)}")
    if problems:
        raise ValueError(
            f"The checkpoint does not fit the weight-normalized {type(module).__name__}, which is left as it was: "
            f"in the checkpoint, {some(problems)}. Load a checkpoint of the same architecture."
        )


def require_same_optimizer_state(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise if the checkpoint's optimizers belong to parameters of other shapes than g and v have now."""
    if not checkpoint.get("optimizer_states"):
        return
    exact = checkpoint.get(KEY, {}).get("model", {})
    state = checkpoint.get("current_model_state", checkpoint.get("state_dict", {}))
    plain: list[str] = []
    others: list[str] = []
    for name, normalized in named_normalized_weights(module):
        g = g_and_v(normalized)[0]
        stored = _find(state, name)
        saved = exact[name][0] if name in exact else stored.values[0] if stored and len(stored.values) > 1 else None
        if not g.requires_grad or stored is None:
            continue
        if saved is None:
            plain.append(repr(name))
        elif saved.shape != g.shape:
            others.append(f"{name!r} ({tuple(saved.shape)} in the checkpoint, {tuple(g.shape)} in the model)")
    fix = (
        "to go on from its weights with a new optimizer, load them by "
        '`model.load_state_dict(torch.load(path)["state_dict"])` and call `fit` without `ckpt_path`.'
    )
    if plain:
        raise ValueError(
            f"The checkpoint's optimizer was built for a model in which {some(plain)} had no g and v, so that it "
            f"cannot be resumed with weight normalization: {fix}"
        )
    if others:
        raise ValueError(
            "The checkpoint's optimizer was built for a model that is normalized over other dimensions: g of "
            f"{some(others)}. Normalize as it was, or, {fix}"
        )


def _find(state_dict: Mapping[str, Tensor], qualified_name: str) -> StoredWeight | None:
    owner, dot, name = qualified_name.rpartition(".")
    return find_weight(state_dict, f"{owner}{dot}", name)
