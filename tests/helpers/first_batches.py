"""Models for the tests of data-dependent initialization, and a reference that goes layer by layer in float64."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.second(self.first(x).relu())
        return self.head(x.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 4))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 6),
    )


def autoencoder():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2),
        nn.ELU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1),
        nn.ELU(),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
    )


def sequence():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Conv1d(12, 5, 3), nn.Tanh(), nn.Linear(6, 3))


def volumes():
    return nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 6, 2, groups=2))


NETS = {
    "mlp": (mlp, (64, 10)),
    "convolutions": (convolutions, (40, 3, 8, 8)),
    "autoencoder": (autoencoder, (16, 2, 9, 9)),
    "sequence": (sequence, (16, 12, 6)),
    "volumes": (volumes, (8, 2, 5, 5, 5)),
    "residual": (Residual, (32, 3, 8, 8)),
}


def is_layer(module):
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def per_unit(module, output):
    """The values of each unit, shape (units, values)."""
    if isinstance(module, nn.Linear):
        return output.reshape(-1, output.shape[-1]).T
    return output.transpose(0, 1).flatten(1)


def moments_of(model, x):
    """Mean and biased standard deviation of each unit of each layer, in the model's own forward pass."""
    found = {}

    def keep(name):
        def hook(module, args, output):
            rows = per_unit(module, output.detach().double())
            found[name] = rows.mean(1), rows.std(1, correction=0)

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if is_layer(m)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def plain_product(layer, x, weight):
    if isinstance(layer, nn.Linear):
        return x @ weight.T
    dims = len(layer.kernel_size)
    if type(layer).__name__.startswith("ConvTranspose"):
        function = getattr(F, f"conv_transpose{dims}d")
        return function(
            x, weight, None, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        )
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, [n for p in reversed(padding) for n in (p, p)], mode=layer.padding_mode)
        padding = 0
    return getattr(F, f"conv{dims}d")(x, weight, None, layer.stride, padding, layer.dilation, layer.groups)


def unit_norms(layer, weight):
    """The norm of what makes each output channel, channel by channel; and the weight with each divided by it."""
    norms, scaled = [], weight.clone()
    if type(layer).__name__.startswith("ConvTranspose"):
        inputs, outputs = weight.shape[0] // layer.groups, weight.shape[1]
        for group in range(layer.groups):
            rows = slice(group * inputs, (group + 1) * inputs)
            for j in range(outputs):
                norms.append(weight[rows, j].norm())
                scaled[rows, j] = weight[rows, j] / norms[-1]
    else:
        for o in range(weight.shape[0]):
            norms.append(weight[o].norm())
            scaled[o] = weight[o] / norms[-1]
    return torch.stack(norms), scaled


@torch.no_grad()
def reference(model, x):
    """g and b of each layer of a plain Sequential by the paper's equations 5 and 6, in float64."""
    x, expected = x.double(), {}
    for name, layer in model.named_children():
        if not is_layer(layer):
            x = layer(x)
            continue
        _, direction = unit_norms(layer, layer.weight.double())
        t = plain_product(layer, x, direction)
        rows = per_unit(layer, t)
        mean, deviation = rows.mean(1), rows.std(1, correction=0)
        expected[name] = 1 / deviation, -mean / deviation
        shape = [-1] if isinstance(layer, nn.Linear) else [-1] + [1] * len(layer.kernel_size)
        x = (t - mean.view(shape)) / deviation.view(shape)
    return expected
