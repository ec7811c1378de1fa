"""Initialize on two ranks whose batches differ in size, and save what each rank holds.

Run as a script: ``python first_batches_on_ranks.py FOLDER``.
"""

import copy
import sys
from pathlib import Path

import torch
from helpers.first_batches import NETS
from helpers.weight_norm_models import Regression, quiet_trainer
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import MeanOnlyBatchNorm

SHARES = (0.375, 1.0)


def batch(name):
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(NETS[name][1], generator=generator) + 1


def part(x, rank):
    """The rank's share of the joined batch."""
    cut = int(SHARES[0] * len(x))
    return x[:cut] if rank == 0 else x[cut:]


class Model(Regression):
    def __init__(self, name, x):
        torch.manual_seed(0)
        super().__init__(NETS[name][0](), lr=0.0)
        self.x = x

    def loss(self, batch):
        return self.net(batch[0]).square().mean()

    def train_dataloader(self):
        # one batch, of which each rank holds its share
        x = self.x if self.trainer.world_size == 1 else part(self.x, self.global_rank)
        return DataLoader(TensorDataset(x), batch_size=len(x))

    val_dataloader = validation_step = None


def initialized(name, **trainer):
    model = Model(name, batch(name))
    options = {"use_distributed_sampler": False, "max_epochs": 1, "limit_val_batches": 0}
    quiet_trainer(WeightNormCallback(init="data"), **(options | trainer)).fit(model)
    return {key: value.clone() for key, value in model.state_dict().items()}


def centered():
    """Outputs and gradients of synchronized mean-only batch normalization, as DDP averages them."""
    torch.manual_seed(0)
    layer, bias = MeanOnlyBatchNorm(4, synchronize=True), nn.Parameter(torch.randn(4))
    net = nn.Linear(3, 4).double()
    joined = torch.randn(10, 3, dtype=torch.float64)
    # equal shares, so that the mean over ranks of their mean losses is the mean of the joined batch
    x = joined[5 * distributed.get_rank() :][:5]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.layer, self.shift = net, layer.double(), nn.Parameter(bias.detach().double())

        def forward(self, x):
            return self.layer(self.net(x), self.shift).pow(3).sum(1)

    model = Both()
    alone = copy.deepcopy(model)
    alone.layer.synchronize = False
    wrapped = DistributedDataParallel(model)
    wrapped(x).mean().backward()
    alone(joined).mean().backward()
    return {
        "means": (model.layer.running_mean, alone.layer.running_mean),
        "gradients": [(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True)],
    }


def main(folder):
    found = {name: initialized(name, strategy="ddp", devices=2) for name in NETS}
    rank = distributed.get_rank()
    torch.save({"initialized": found, "centered": centered()}, folder / f"rank{rank}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
