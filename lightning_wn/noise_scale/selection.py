"""Which probe reads a run, decided from facts: strategy, data-parallel ranks, accumulation, layers."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_wn.noise_scale.probes.base import Probe
from lightning_wn.noise_scale.probes.consecutive import ConsecutiveProbe
from lightning_wn.noise_scale.probes.micro_batch import MicroBatchProbe
from lightning_wn.noise_scale.run_facts import largest_accumulation
from lightning_wn.noise_scale.strategies import require_readable_strategy

PROBES: dict[str, type[Probe]] = {
    MicroBatchProbe.name: MicroBatchProbe,
    ConsecutiveProbe.name: ConsecutiveProbe,
}


def choose_probe(wish: str, trainer: Trainer, pl_module: LightningModule) -> str:
    """Return the name of the probe for this run; ``wish`` itself unless it is ``"auto"``.

    ``micro_batch`` wherever an optimizer step has, or by a schedule will have, two or more micro-batches over
    all ranks. On one device without accumulation, ``consecutive``.

    Raises:
        ValueError: If nothing can read the run, with a sentence that names the fix.
    """
    require_readable_strategy(trainer.strategy)
    if not pl_module.automatic_optimization:
        raise ValueError(
            "`GradientNoiseScaleCallback` reads gradients under automatic optimization only, and "
            f"{type(pl_module).__name__} sets `automatic_optimization = False`; remove the callback or use "
            "automatic optimization."
        )
    name = wish
    if wish == "auto":
        several = trainer.world_size * largest_accumulation(trainer) >= 2
        name = MicroBatchProbe.name if several else ConsecutiveProbe.name
    PROBES[name]().require_readable(trainer, pl_module)
    return name
