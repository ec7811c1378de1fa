"""Well-known transforms that let the rows of a batch share data, recognised by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

_NAMES = re.compile(r"mixup|cutmix|fmix|resizemix|puzzlemix|saliencymix|snapmix|mosaic|repeataug|rasampler")
"""In lower case without underscores, parts of the names of: MixUp and CutMix (torchvision), Mixup and FastCollateMixup
(timm), RandomMixUpV2, RandomCutMixV2 and RandomMosaic (kornia), RepeatAugSampler (timm), RASampler (torchvision)."""
_DEPTH, _WIDTH = 7, 100
_PARTS_OF_LOADER = ("collate_fn", "sampler", "batch_sampler", "dataset")
_STEPS = ("training_step", "on_after_batch_transfer", "on_before_batch_transfer", "transfer_batch_to_device")


def known_mixer(trainer: Trainer, model: LightningModule) -> str:
    """Return the name of a transform that lets the rows of a batch share data, or an empty string.

    It is looked for where batches are made: in the training loader's collate function, samplers and data set, in
    attributes of the LightningModule and the LightningDataModule, and in what their training step and hooks call.

    Args:
        trainer: Whose training loader is set up.
        model: The model.
    """
    owners: list[Any] = [model]
    datamodule = getattr(trainer, "datamodule", None)
    if isinstance(datamodule, LightningDataModule):
        owners.append(datamodule)
    starts = [getattr(loader, part, None) for loader in _loaders(trainer.train_dataloader) for part in _PARTS_OF_LOADER]
    for owner in owners:
        starts += [value for name, value in vars(owner).items() if name not in ("_trainer", "_modules")]
        starts += list(getattr(owner, "_modules", {}).values())
        starts += [step for name in _STEPS if (step := getattr(owner, name, None)) is not None]
    seen: set[int] = {id(owner) for owner in owners} | {id(trainer)}
    return next((name for start in starts for name in _names(start, seen, _DEPTH)), "")


def _loaders(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, CombinedLoader):
        yield from loaders.flattened
    elif isinstance(loaders, Mapping):
        for loader in loaders.values():
            yield from _loaders(loader)
    elif isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _loaders(loader)
    elif loaders is not None:
        yield loaders


def _names(value: Any, seen: set[int], depth: int) -> Iterator[str]:
    """Find names of mixers in a value and in what it holds."""
    if depth < 0 or id(value) in seen or isinstance(value, str | bytes | int | float | Tensor | type | ModuleType):
        return
    seen.add(id(value))
    name = value.__name__ if isinstance(value, FunctionType) else type(value).__name__
    # timm's knows that it is switched off
    if _NAMES.search(name.replace("_", "").lower()) and getattr(value, "mixup_enabled", True):
        yield name
        return
    for part in _parts(value):
        yield from _names(part, seen, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    """Return what a value holds, or what a function calls."""
    parts: Iterable[Any]
    if isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        parts = [value.__func__, value.__self__, *_called(value.__func__, value.__self__)]
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        parts = [*cells, *_called(value)]
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple | AbstractSet):
        parts = value
    elif isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if not name.startswith("_")}
        parts = [*value.children(), *own.values()]
    else:
        parts = getattr(value, "__dict__", {}).values()
    return islice(parts, _WIDTH)


def _called(function: Any, owner: Any = None) -> list[Any]:
    """Return what a function's code names: functions and objects of its module, and methods of its owner."""
    code, known = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if code is None:
        return []
    found = [known[name] for name in code.co_names if name in known]
    methods = [getattr(type(owner), name, None) for name in code.co_names] if owner is not None else []
    return [*found, *(method for method in methods if isinstance(method, FunctionType))]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
