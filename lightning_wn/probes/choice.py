"""Which probe reads a run, decided from facts: strategy, data-parallel ranks, accumulation, layers."""

from __future__ import annotations

from collections.abc import Collection

from lightning.pytorch import LightningModule, Trainer

from lightning_wn.per_example.rules.errors import can_have_examples
from lightning_wn.probes.base import Probe
from lightning_wn.probes.batch_pair import BatchPairProbe
from lightning_wn.probes.consecutive import ConsecutiveProbe
from lightning_wn.probes.loss_terms import LossTermsProbe
from lightning_wn.probes.micro_batch import MicroBatchProbe
from lightning_wn.probes.per_example import PerExampleProbe
from lightning_wn.probes.requirements import parameter_placement
from lightning_wn.probes.sharded import ShardedProbe
from lightning_wn.trainer import epoch_has_same_examples

_IN_ORDER: tuple[type[Probe], ...] = (
    MicroBatchProbe,
    ShardedProbe,
    PerExampleProbe,
    BatchPairProbe,
    LossTermsProbe,
    ConsecutiveProbe,
)
PROBES: dict[str, type[Probe]] = {probe.name: probe for probe in _IN_ORDER}


def choose_probe(
    wish: str,
    trainer: Trainer,
    pl_module: LightningModule,
    accumulation: int,
    *,
    independent: bool = True,
    unfit: Collection[str] = (),
) -> str | None:
    """Return the name of the probe for this run; ``wish`` itself unless it is ``"auto"``.

    ``sharded`` under ModelParallelStrategy. ``micro_batch`` wherever an optimizer step has two or more micro-batches
    over all ranks. On one device without accumulation ``per_example``, or ``batch_pair`` for models that mix the
    examples of a batch (BatchNorm) or are compiled, for several optimizers, and where examples share data.

    Args:
        wish: A probe's name or ``"auto"``.
        trainer: The Trainer.
        pl_module: The model.
        accumulation: Micro-batches in an optimizer step of each rank.
        independent: Whether the examples of a batch share no data.
        unfit: Probes that were found unable to read this run, which ``"auto"`` passes over.

    Returns:
        None where ``"auto"`` finds none that is left.

    Raises:
        ValueError: If nothing can read the run's strategy, or not the probe that was wished for; names the fix.
    """
    sharded = parameter_placement(trainer.strategy) == "sharded"
    if wish == "auto":
        candidates = _candidates(trainer, pl_module, accumulation, sharded=sharded, independent=independent)
        return next((name for name in candidates if name not in unfit), None)
    if sharded != (wish == ShardedProbe.name):
        raise ValueError(
            f"`probe={wish!r}` cannot read gradients under {type(trainer.strategy).__name__}; use `probe='auto'`, "
            f"which takes {ShardedProbe.name!r} under ModelParallelStrategy and another probe elsewhere."
        )
    if wish == PerExampleProbe.name and not independent:
        raise ValueError(
            "`probe='per_example'` takes the examples of a batch as independent samples, and "
            "`examples_are_independent=False` says that they are not; use `probe='batch_pair'`, or `probe='auto'`, "
            "which takes it."
        )
    return wish


def _candidates(
    trainer: Trainer, pl_module: LightningModule, accumulation: int, *, sharded: bool, independent: bool
) -> list[str]:
    """List the probes that suit the run, the best first."""
    if sharded:
        return [ShardedProbe.name]
    if trainer.world_size * accumulation >= 2:
        return [MicroBatchProbe.name]
    whole = independent and len(trainer.optimizers) < 2 and can_have_examples(pl_module)
    # where one batch holds all data there are no two to compare
    pair = LossTermsProbe.name if epoch_has_same_examples(trainer, 1) else BatchPairProbe.name
    return [*([PerExampleProbe.name] if whole else []), pair, ConsecutiveProbe.name]
