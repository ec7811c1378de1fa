"""What the micro-batch probe costs, beside the floor for any method that needs a small and a big norm.

A small transformer (about 5 M parameters, 1,024 tokens an optimizer step) trains under Lightning with
one, two or four micro-batches a step; one is what each rank of a DDP run does. Three kinds of optimizer
steps take turns within one run, so that they share the machine's mood: plain, measured by the real
callback, and plain with two bare ``torch._foreach_norm`` passes over the gradients. Medians and ratios
are printed. Run it with ``python benchmarks/micro_batch_overhead.py`` where lightning_wn is installed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import lightning as L
import torch
from peak_memory import peak_bytes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback
from lightning_wn.probes import MeasuredParameters, MicroBatchProbe

MODES = ("plain", "probe", "floor")
CLOCK = time.perf_counter


class Transformer(L.LightningModule):
    """Decoder-like stack on random tokens, width 256, 6 layers."""

    def __init__(self, width: int = 256, layers: int = 6, vocabulary: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.head(self.blocks(self.embedding(batch[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, foreach=True)


class Turns(L.Callback):
    """Times each optimizer step, and lets the callback measure in its turn only."""

    def __init__(self, callback: GradientNoiseScaleCallback, warmup: int) -> None:
        self.callback = callback
        self.warmup = warmup
        self.times: dict[str, list[float]] = {mode: [] for mode in MODES}
        self.synchronization: list[float] = []

    def mode(self, trainer: L.Trainer) -> str:
        return MODES[trainer.global_step % len(MODES)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # one micro-batch on one device stands for a rank of DDP, which the callback itself would not take it for
        self.callback._measurements[0].attach(trainer.optimizers[0], pl_module, alone=True)
        self.callback.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.turn = self.mode(trainer)
            self.start = CLOCK()
        if self.turn == "probe":
            self.callback.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        if self.turn == "probe":
            self.callback.on_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.turn == "probe":
            self.callback.on_after_backward(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.turn == "probe":
            self.callback.on_before_optimizer_step(trainer, pl_module, optimizer)
        elif self.turn == "floor":
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norms = [torch._foreach_norm(gradients), torch._foreach_norm(gradients)]
        self.stepping = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if not getattr(self, "stepping", False):
            return
        self.stepping = False
        if trainer.global_step > self.warmup:
            self.times[self.turn].append(CLOCK() - self.start)
        if trainer.global_step % 30 == 0:
            start = CLOCK()
            self.callback._measurements.synchronize(across_ranks=False)
            self.callback._log.write(trainer)
            self.synchronization.append(CLOCK() - start)


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle * 1e3:8.2f} ms (quartiles {low * 1e3:.2f} to {high * 1e3:.2f})"


def benchmark(accumulate: int, steps: int, sequence: int = 64) -> None:
    model = Transformer()
    micro_batch = 1024 // sequence // accumulate
    data = torch.randint(0, 512, (micro_batch * accumulate * 8, sequence + 1))
    callback = GradientNoiseScaleCallback("micro_batch", every_n_steps=1)
    turns = Turns(callback, warmup=2 * len(MODES))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps * len(MODES),
        accumulate_grad_batches=accumulate,
        callbacks=[turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, micro_batch))
    callback._measurements[0].probe.detach()
    plain = statistics.median(turns.times["plain"])
    size = sum(p.numel() for p in model.parameters())
    print(f"\n{size / 1e6:.2f} M parameters, {accumulate} micro-batches of {micro_batch} x {sequence} tokens a step")
    for mode in MODES:
        median = statistics.median(turns.times[mode])
        print(f"  {mode:6} {quartiles(turns.times[mode])}  {median / plain:.4f}x plain")
    # each measured and each floor step beside the plain step before it: the machine's drift cancels
    extra = {
        mode: statistics.median(
            [other - own for own, other in zip(turns.times["plain"], turns.times[mode], strict=False)]
        )
        for mode in ("probe", "floor")
    }
    synchronization = statistics.median(turns.synchronization)
    cadence = callback._measurements[0].probe.default_every_n_steps
    amortised = 1 + extra["probe"] / cadence / plain + synchronization / 50 / plain
    ratio = extra["probe"] / extra["floor"]
    print(f"  probe's overhead / floor's overhead: {ratio:.2f}; the probe takes {accumulate + 1} norms, the floor 2")
    print(f"  synchronise and log: {synchronization * 1e3:.2f} ms, once in 50 steps")
    print(f"  at the defaults (one step in {cadence}): {amortised:.4f}x plain  (at most 1.01)")


def peak_memory() -> None:
    """Print the peak of what a step with two micro-batches makes, with the probe and without it."""
    model = Transformer()
    parameters = list(model.parameters())
    batches = torch.randint(0, 512, (2, 2, 65))
    probe, measured = MicroBatchProbe(), MeasuredParameters(parameters)
    probe.begin(0, 1, model, measured)

    def step(*, with_probe: bool) -> None:
        if with_probe:
            probe.begin(0, 1, model, measured)
        for index, batch in enumerate(batches):
            if with_probe:
                probe.before_backward()
            (model.training_step(batch, index) / 2).backward()
            if with_probe:
                probe.after_backward(2, 0.5, None)
        if with_probe:
            samples = probe.finish(None, full=True)
            assert samples is not None
            samples.to_row()
        for parameter in parameters:
            parameter.grad = None

    plain, measured_step = (peak_bytes(lambda kind=kind: step(with_probe=kind)) for kind in (False, True))
    held = sum(p._places[0].numel() * 8 * len(p._places) + p.signs.numel() * 4 for p in probe._projections.values())
    size = sum(p.numel() * p.element_size() for p in parameters)
    extra = measured_step - plain + held
    print(
        f"\npeak memory of tensors: the probe adds {extra} bytes to a step, {extra / size:.4%} of the parameters' "
        "bytes (at most 1 %)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="timed steps of each kind")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU time, on a busy machine")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.cpu_time:
        CLOCK = time.process_time
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    for accumulate in (1, 2, 4):
        benchmark(accumulate, arguments.steps)
    peak_memory()
