"""Two small networks, each with a loss and an optimizer of its own, stepped by hand."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn


class GAN(L.LightningModule):
    """Two small networks with two losses; ``toggle`` as Lightning's example does, or with zeroing alone."""

    def __init__(self, *, toggle: bool, set_to_none: bool = True, first: str = "generator", lr: float = 0.0):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
            self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.toggle, self.set_to_none, self.first, self.lr = toggle, set_to_none, first, lr

    def generator_loss(self, z, x):
        return nn.functional.softplus(-self.discriminator(self.generator(z))).mean()

    def discriminator_loss(self, z, x):
        fake = nn.functional.softplus(self.discriminator(self.generator(z).detach())).mean()
        return (fake + nn.functional.softplus(-self.discriminator(x)).mean()) / 2

    def training_step(self, batch, batch_idx):
        optimizers = dict(zip(("generator", "discriminator"), self.optimizers(), strict=True))
        order = ("generator", "discriminator") if self.first == "generator" else ("discriminator", "generator")
        for name in order:
            optimizer = optimizers[name]
            if self.toggle:
                self.toggle_optimizer(optimizer)
            loss = getattr(self, f"{name}_loss")(*batch)
            optimizer.zero_grad(set_to_none=self.set_to_none)
            self.manual_backward(loss)
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=self.lr) for net in (self.generator, self.discriminator)]


def gan_data(count=32):
    generator = torch.Generator().manual_seed(3)
    return torch.utils.data.TensorDataset(
        torch.randn(count, 4, generator=generator), torch.randn(count, 6, generator=generator)
    )


def gan_samples(name, batches=(slice(0, 16), slice(16, 32)), count=32):
    """Gradients of one network over these batches, by autograd on a copy in float64."""
    model = GAN(toggle=False).double()
    z, x = (tensor.double() for tensor in gan_data(count).tensors)
    samples = []
    for batch in batches:
        loss = getattr(model, f"{name}_loss")(z[batch], x[batch])
        gradients = torch.autograd.grad(loss, list(getattr(model, name).parameters()))
        samples.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(samples)
