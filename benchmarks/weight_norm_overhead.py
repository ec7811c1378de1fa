"""What weight normalization costs, beside the plain model and torch's own parametrization.

A small transformer (width 128, 4 layers, every Linear normalized) takes turns within one run, so that all
share the machine's mood: inference of one sequence of 16 tokens, plain, under torch's
``parametrizations.weight_norm`` and under ours, each as it is and inside a scope that keeps the weights;
``Trainer.predict``, plain and with ``WeightNormCallback``; and training steps with SGD on 1, 16 and 64
sequences. Medians of the ratios of neighbouring measurements are printed. Run it with
``python benchmarks/weight_norm_overhead.py`` where lightning_wn is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader

from lightning_wn import WeightNormCallback, apply_weight_norm, cached_weight_norm

WIDTH, TOKENS = 128, 16


class Block(nn.Module):
    """Attention and a feed-forward net, before each a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (part.view(batch, tokens, 4, -1).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Transformer(L.LightningModule):
    """Times its own predict steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.times: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        start = time.perf_counter()
        self(batch)
        self.times.append(time.perf_counter() - start)


def under_torchs(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            parametrizations.weight_norm(module)
    return model


def under_ours(model: nn.Module) -> nn.Module:
    apply_weight_norm(model)
    return model


def build() -> dict[str, nn.Module]:
    return {"plain": Transformer(), "torch": under_torchs(Transformer()), "ours": under_ours(Transformer())}


def timed(work: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return time.perf_counter() - start


def ratios(cases: dict[str, Callable[[], Any]], rounds: int, repeats: int) -> dict[str, float]:
    """Time each case in turn with the first; return each one's median ratio to it."""
    first, *others = cases
    found = {}
    for name in others:
        pairs = []
        for _ in range(rounds + 1):
            # one always follows the other, so that both find the same caches
            base, own = timed(cases[first], repeats), timed(cases[name], repeats)
            pairs.append(own / base)
        found[name] = statistics.median(pairs[1:])
    return found


def inference(rounds: int) -> dict[str, float]:
    models = {name: model.eval() for name, model in build().items()}
    x = torch.randn(1, TOKENS, WIDTH)

    def case(name: str, scope: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[], None]:
        def run() -> None:
            with scope():
                for _ in range(10):
                    models[name](x)

        return run

    cases = {
        "plain": case("plain", contextlib.nullcontext),
        "torch": case("torch", contextlib.nullcontext),
        "ours": case("ours", contextlib.nullcontext),
    }
    with torch.inference_mode():
        found = ratios(cases, rounds, 1)
        # one scope around all, as in an evaluation
        with cached_weight_norm(models["ours"]), parametrize.cached():
            kept = ratios(cases, rounds, 1)
    return found | {"torch, parametrize.cached()": kept["torch"], "ours, cached_weight_norm": kept["ours"]}


def prediction(rounds: int) -> float:
    """Return the median ratio of predict steps, of whole loops in turn."""
    models = {"plain": Transformer(), "ours": under_ours(Transformer())}
    data = DataLoader(torch.randn(300, TOKENS, WIDTH), batch_size=1)
    found = []
    for round_ in range(rounds + 1):
        medians = {}
        for name, model in models.items():
            options: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
            callbacks = [WeightNormCallback()] if name == "ours" else []
            trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **options)
            model.times = []
            trainer.predict(model, data, return_predictions=False)
            medians[name] = statistics.median(model.times[5:])
        if round_:
            found.append(medians["ours"] / medians["plain"])
    return statistics.median(found)


def training(batch: int, rounds: int) -> dict[str, float]:
    x = torch.randn(batch, TOKENS, WIDTH)

    def case(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def run() -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        return run

    cases = {name: case(model) for name, model in build().items()}
    beside_torch = ratios({"torch": cases["torch"], "ours": cases["ours"]}, rounds, 3)
    return ratios(cases, rounds, 3) | {"ours over torch": beside_torch["ours"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    print(f"medians of {arguments.rounds} ratios to the plain model; torch {torch.__version__}, CPU")
    for name, ratio in inference(arguments.rounds).items():
        print(f"inference, 1 x {TOKENS} tokens: {name:28} {ratio:.3f}x")
    print(f"Trainer.predict, 1 x {TOKENS} tokens: {'WeightNormCallback':22} {prediction(9):.3f}x")
    for batch in (1, 16, 64):
        for name, ratio in training(batch, arguments.rounds).items():
            print(f"training step, {batch:2} x {TOKENS} tokens: {name:25} {ratio:.3f}x")


if __name__ == "__main__":
    main()
