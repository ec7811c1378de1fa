"""Transforms that let rows share data are recognised by name, wherever users put them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers.frozen_digits import DigitsMLP, digits
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset, default_collate

from lightning_wn.probes.checks.mixers import known_mixer


class MixUp(nn.Module):
    """As torchvision.transforms.v2 names it."""


class CutMix(MixUp):
    pass


class Mixup:
    """As timm names it; it is switched on and off."""

    mixup_enabled = True

    def __call__(self, x, y):
        return x, y


class FastCollateMixup(Mixup):
    pass


class RandomMixUpV2(nn.Module):
    """As kornia names it."""


class RandomMosaic(nn.Module):
    pass


class RandomCutmix(nn.Module):
    pass


class RepeatAugSampler(RandomSampler):
    pass


class Compose:
    def __init__(self, *transforms):
        self.transforms = transforms


class RandomChoice(nn.Module):
    def __init__(self, *transforms):
        super().__init__()
        self.choices = nn.ModuleList(transforms)


cutmix_or_mixup = RandomChoice(CutMix(), MixUp())


def collate(examples):
    """As torchvision's documentation advises."""
    return cutmix_or_mixup(*default_collate(examples))


def collate_with(mixer, examples):
    return mixer(*default_collate(examples))


def in_closure(mixer):
    return lambda examples: mixer(*default_collate(examples))


def mixup_data(x, y):
    return x, y


class Collator:
    def __init__(self, mixer):
        self.mixer = mixer

    def collate(self, examples):
        return self.mixer(*default_collate(examples))

    def __call__(self, examples):
        return self.collate(examples)


class WithAttribute(DigitsMLP):
    def __init__(self, mixer):
        super().__init__()
        self.augment = mixer


class CallsFunction(DigitsMLP):
    def training_step(self, batch, batch_idx):
        return super().training_step(mixup_data(*batch), batch_idx)


class CallsMethod(DigitsMLP):
    def cut_mix(self, x, y):
        return x, y

    def training_step(self, batch, batch_idx):
        return super().training_step(self.cut_mix(*batch), batch_idx)


class InTransfer(DigitsMLP):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return mixup_data(*batch)


class Data(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.batch_transform = Compose(nn.Identity(), RandomMixUpV2())


class WithTransforms(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(index)


def find(model=None, datamodule=None, data=None, **of_loader):
    loader = DataLoader(data or digits(8), 4, **of_loader)
    return known_mixer(SimpleNamespace(train_dataloader=loader, datamodule=datamodule), model or DigitsMLP())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"collate_fn": collate}, "CutMix"),
        ({"collate_fn": MixUp()}, "MixUp"),
        ({"collate_fn": FastCollateMixup()}, "FastCollateMixup"),
        ({"collate_fn": partial(collate_with, Mixup())}, "Mixup"),
        ({"collate_fn": in_closure(RandomCutmix())}, "RandomCutmix"),
        ({"collate_fn": Collator(Mixup())}, "Mixup"),
        ({"collate_fn": Collator(Mixup()).collate}, "Mixup"),
        ({"collate_fn": lambda examples: mixup_data(*default_collate(examples))}, "mixup_data"),
        ({"data": WithTransforms(Compose(int, RandomMosaic()))}, "RandomMosaic"),
        ({"data": Subset(ConcatDataset([WithTransforms(RandomChoice(CutMix()))]), [0, 1])}, "CutMix"),
        ({"sampler": RepeatAugSampler(digits(8))}, "RepeatAugSampler"),
        ({"model": WithAttribute(RandomChoice(nn.Identity(), RandomMixUpV2()))}, "RandomMixUpV2"),
        ({"model": WithAttribute(Mixup())}, "Mixup"),
        ({"model": WithAttribute([partial(Mixup())])}, "Mixup"),
        ({"model": CallsFunction()}, "mixup_data"),
        ({"model": CallsMethod()}, "cut_mix"),
        ({"model": InTransfer()}, "mixup_data"),
        ({"datamodule": Data()}, "RandomMixUpV2"),
    ],
)
def test_found(arguments, name):
    assert find(**arguments) == name


class Off(Mixup):
    mixup_enabled = False


class Numbers(DigitsMLP):
    """Names of settings are not what they would switch on."""

    def __init__(self):
        super().__init__()
        self.mixup_alpha, self.cutmix = 0.0, None

    def training_step(self, batch, batch_idx):
        if self.mixup_alpha > 0:
            raise AssertionError
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"model": Numbers()},
        {"model": WithAttribute(Off())},
        {"collate_fn": default_collate},
        {"data": WithTransforms(Compose(nn.Identity(), RandomChoice(nn.Dropout())))},
        {"model": WithAttribute(list(range(100_000)))},
    ],
)
def test_not_found(arguments):
    assert not find(**arguments)


def test_several_loaders_and_none():
    loaders = {"a": DataLoader(digits(8)), "b": [DataLoader(digits(8), collate_fn=collate)]}
    assert known_mixer(SimpleNamespace(train_dataloader=loaders, datamodule=None), DigitsMLP()) == "CutMix"
    assert not known_mixer(SimpleNamespace(train_dataloader=None, datamodule=None), DigitsMLP())


def test_the_real_ones():
    timm = pytest.importorskip("timm.data")
    assert find(collate_fn=timm.FastCollateMixup(num_classes=10)) == "FastCollateMixup"
    assert find(model=WithAttribute(timm.Mixup(num_classes=10))) == "Mixup"
    assert not find(model=WithAttribute(timm.Mixup(mixup_alpha=0.0, cutmix_alpha=0.0, num_classes=10)))


def test_the_real_ones_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms.v2")
    choice = transforms.RandomChoice([transforms.CutMix(num_classes=10), transforms.MixUp(num_classes=10)])
    assert find(collate_fn=in_closure(choice)) in ("CutMix", "MixUp")
    assert not find(data=WithTransforms(transforms.Compose([transforms.RandomHorizontalFlip()])))
