"""FSDP2 on two CPU ranks with weight-normalized layers: ``python weight_norm_sharded.py FOLDER``.

Each rank writes what it found to FOLDER/rank<r>.json.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from helpers.weight_norm_models import Recurrent, Regression, quiet_trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import add_mean_only_batch_norm, apply_weight_norm, cached_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.core.normalized_module import normalized_weights, reshard


class Sharded(Regression):
    """Applies weight norm before it shards, on a chosen device."""

    def __init__(self, device="cpu", apply=True):
        pl.seed_everything(0)
        with torch.device(device):
            super().__init__(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2, bias=False)))
        self.apply_first = apply

    def configure_model(self):
        if isinstance(self.net, FSDPModule):
            return
        if self.apply_first:
            apply_weight_norm(self)
        for module in (self.net[0], self.net[2], self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class WithMeans(Sharded):
    """Has running means before it shards."""

    synchronize = True

    def configure_model(self):
        if not isinstance(self.net, FSDPModule):
            apply_weight_norm(self)
            add_mean_only_batch_norm(self, synchronize=self.synchronize)
        super().configure_model()


class ApartMeans(WithMeans):
    """Has running means that differ between ranks."""

    synchronize = False


class RecurrentSharded(Recurrent):
    """An LSTM and a head, each a group of its own."""

    def configure_model(self):
        if isinstance(self.net["lstm"], FSDPModule):
            return
        apply_weight_norm(self, "net.*")
        for module in self.net.values():
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


class Stop(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1


def trainer(*callbacks, form="parametrized", distributed=True, **options):
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )
    callback = WeightNormCallback(checkpoint=form, **options)
    return quiet_trainer(callback, *callbacks, strategy=strategy, devices=2, max_epochs=3)


def whole(model):
    return {name: p.full_tensor().tolist() for name, p in model.named_parameters()}


def error_of(*args, build=Sharded, **kwargs):
    try:
        trainer(**kwargs).fit(build(*args))
    except ValueError as error:
        return str(error)
    return "no error"


def main(folder):
    results = {}
    model = Sharded()
    run = trainer()
    run.fit(model)
    rank = run.global_rank
    results["trained"] = whole(model)

    for distributed in (True, False):
        path = folder / ("distributed" if distributed else "full.ckpt")
        half = Sharded()
        first = trainer(Stop(), distributed=distributed)
        first.fit(half)
        first.save_checkpoint(path)
        again = Sharded()
        trainer(distributed=distributed).fit(again, ckpt_path=path)
        results[f"resumed {distributed}"] = whole(again)
        results[f"half weights {distributed}"] = {name: p.tolist() for name, p in weights(half).items()}

    centered, again = WithMeans(), WithMeans()
    trainer(mean_only_batch_norm=True).fit(centered)
    first = trainer(Stop(), mean_only_batch_norm=True)
    half = WithMeans()
    first.fit(half)
    first.save_checkpoint(folder / "means")
    trainer(mean_only_batch_norm=True).fit(again, ckpt_path=folder / "means")
    results["means"] = [whole(centered), whole(again)]
    results["running"] = [m.net[0].mean_only_batch_norm.running_mean.tolist() for m in (centered, again)]

    recurrent = RecurrentSharded()
    recurrent.batch_size = 16  # with the other rank's all of the data, in whatever order
    trainer(modules="net.*").fit(recurrent)
    results["recurrent"] = {name: p.tolist() for name, p in weights(recurrent).items()}
    # after an evaluation, the outermost shards are whole
    with torch.no_grad():
        recurrent.predict_step(next(iter(recurrent.data())), 0)
    try:
        fold_weight_norm(recurrent)
    except ValueError as error:
        results["fold after evaluation"] = str(error)
    results["data"] = error_of(init="data")
    results["late means"] = error_of(mean_only_batch_norm=True)
    results["means apart"] = error_of(build=ApartMeans)
    results["folded"] = error_of(form="folded")
    results["folds at the end"] = error_of(fold_on_fit_end=True)
    results["too late"] = error_of("cpu", False)

    meta = Sharded("meta")
    seen = {}

    class Look(Callback):
        def on_fit_start(self, trainer, pl_module):
            layer = pl_module.net[2]
            g, v = (getattr(layer.parametrizations.weight, f"original{i}").full_tensor() for i in range(2))
            seen["off"] = float((v.norm(dim=1, keepdim=True) - g).abs().max())
            seen["largest"] = float(v.abs().max())

    trainer(Look()).fit(meta)
    results["meta"] = seen | {"trained": all(torch.isfinite(p.full_tensor()).all().item() for p in meta.parameters())}
    try:
        fold_weight_norm(model)
    except ValueError as error:
        results["fold"] = str(error)
    x = torch.ones(1, 4)
    with torch.no_grad(), cached_weight_norm(model):
        results["cached"] = [model.net(x).tolist(), model.net(x).tolist()]
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


def weights(model):
    """The whole weights, by the layers' own composition."""
    reshard(model)
    return {
        name if tensor == "weight" else f"{name}.{tensor}": chain().full_tensor().detach()
        for name, layer in model.named_modules()
        for tensor, chain in normalized_weights(layer).items()
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
