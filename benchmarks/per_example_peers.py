"""Time and memory of a step that measures per-example gradient norms: this package beside others, in one run.

Each tool takes a copy of the same model through forward, backward and the optimizer's step, and reads every
example's squared gradient norm, or for gns-pytorch what it makes of them. Tools take turns, so that all of them
meet the same load; medians are shown, as a multiple of a plain step. Extra memory is the peak of live tensor
bytes (``peak_memory.py``) above that of a plain step. What is not installed or does not support a model is said so.

    pip install opacus gns-pytorch backpack-for-pytorch
    python benchmarks/per_example_peers.py
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peak_memory import peak_bytes
from per_example_overhead import Block, LinearAttention, clock
from torch import Tensor, nn

from lightning_wn.per_example import PerExampleNorms

Step = Callable[[], Tensor | None]
"""Forward, measured backward and optimizer step; returns squared norms of the mean loss, shape (B,), if any."""


class Losses(nn.Module):
    """A model with its loss: one number an example."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.body(x)
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return losses.view(len(x), -1).mean(1)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def transformer(width: int, layers: int, batch: int, length: int) -> tuple[nn.Module, Tensor, Tensor]:
    blocks = [Block(width, LinearAttention(width)) for _ in range(layers)]
    body = nn.Sequential(nn.Embedding(512, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 512))
    tokens = torch.randint(0, 512, (batch, length + 1))
    return body, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def resnet(batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    body = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), Residual(32), nn.Conv2d(32, 64, 3, stride=2, padding=1), Residual(64),
        nn.Conv2d(64, 128, 3, stride=2, padding=1), Residual(128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip
    return body, torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))


def mlp(batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    body = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return body, torch.randn(batch, 784), torch.randint(0, 10, (batch,))


def plain(body: nn.Module, x: Tensor, labels: Tensor) -> Step:
    model, optimizer = Losses(body), torch.optim.AdamW(body.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x, labels).mean().backward()
        optimizer.step()

    return step


def ours(body: nn.Module, x: Tensor, labels: Tensor) -> Step:
    model, optimizer = Losses(body), torch.optim.AdamW(body.parameters(), lr=1e-4)
    norms = PerExampleNorms(model, list(model.parameters()))
    norms.attach()

    def step() -> Tensor:
        optimizer.zero_grad()
        norms.before_forward(len(x))
        loss = model(x, labels).mean()
        norms.before_backward(loss)
        loss.backward()
        sq_norms = norms.after_backward()
        optimizer.step()
        return sq_norms

    return step


def opacus(body: nn.Module, x: Tensor, labels: Tensor) -> Step:
    module = importlib.import_module("opacus.grad_sample").GradSampleModuleFastGradientClipping
    wrapped = module(body, batch_first=True, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True)
    model, optimizer = Losses(wrapped), torch.optim.AdamW(body.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad()
        model(x, labels).mean().backward()
        norms: Tensor = wrapped.get_norm_sample()
        optimizer.step()
        return (norms / len(x)).square()

    return step


def gns_pytorch(body: nn.Module, x: Tensor, labels: Tensor) -> Step:
    compute_gns = importlib.import_module("gns_pytorch").compute_gns
    model, optimizer = Losses(body), torch.optim.AdamW(body.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        losses = model(x, labels)
        compute_gns(losses, model)
        losses.mean().backward()
        optimizer.step()

    return step


def backpack(body: nn.Module, x: Tensor, labels: Tensor) -> Step:
    package = importlib.import_module("backpack")
    norm = importlib.import_module("backpack.extensions").BatchL2Grad
    model = Losses(package.extend(body, use_converter=False))
    optimizer = torch.optim.AdamW(body.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad()
        with package.backpack(norm()):
            model(x, labels).mean().backward()
        optimizer.step()
        return torch.stack([p.batch_l2 for p in body.parameters()]).sum(0)

    return step


TOOLS = {
    "plain": plain,
    "this package": ours,
    "opacus ghost norms": opacus,
    "gns-pytorch": gns_pytorch,
    "BackPACK BatchL2Grad": backpack,
}

MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "transformer d=256, 6 layers, 8x128 tokens": lambda: transformer(256, 6, 8, 128),
    "transformer d=512, 3 layers, 8x64 tokens": lambda: transformer(512, 3, 8, 64),
    "transformer d=256, 4 layers, 4x512 tokens": lambda: transformer(256, 4, 4, 512),
    "ResNet with GroupNorm, 16 images of 32x32": lambda: resnet(16),
    "MLP 784-1024-1024-10, batch 128": lambda: mlp(128),
}


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:90]


def try_out(tool: str, body: nn.Module, x: Tensor, labels: Tensor) -> tuple[Step, Tensor | None] | None:
    """Build a tool's step and take the first; None, and a line that says why, where it cannot be had."""
    try:
        step = TOOLS[tool](copy.deepcopy(body), x, labels)
        return step, step()
    except ImportError as error:
        print(f"  {tool}: skipped, not installed ({first_line(error)})")
    # each tool says in its own way that it cannot
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        print(f"  {tool}: does not support this model ({type(error).__name__}: {first_line(error)})")
    return None


def compare(make: Callable[[], tuple[nn.Module, Tensor, Tensor]], repeats: int, now: Callable[[], float]) -> None:
    torch.manual_seed(0)
    body, x, labels = make()
    found = {tool: try_out(tool, body, x, labels) for tool in TOOLS}
    steps = {tool: tried[0] for tool, tried in found.items() if tried is not None}
    first = {tool: tried[1] for tool, tried in found.items() if tried is not None}
    times: dict[str, list[float]] = {tool: [] for tool in steps}
    for repeat in range(repeats + 2):
        for tool, step in steps.items():
            start = now()
            step()
            if repeat >= 2:
                times[tool].append(now() - start)
    memory = {tool: peak_bytes(step) for tool, step in steps.items()}
    base, reference = statistics.median(times["plain"]), first["this package"]
    for tool, seconds in times.items():
        median, sq_norms = statistics.median(seconds), first[tool]
        line = f"  {tool:<21}{median * 1e3:8.1f} ms {median / base:6.2f}x"
        if tool == "plain":
            print(f"{line}   peak {memory[tool] / 2**20:6.1f} MiB")
            continue
        line += f"   extra {(memory[tool] - memory['plain']) / 2**20:7.1f} MiB"
        if tool != "this package":
            line += f"   this package takes {statistics.median(times['this package']) / median:.2f}x its time"
        if sq_norms is not None and reference is not None and tool != "this package":
            line += f", norms differ by {((sq_norms - reference).abs() / reference).max().item():.0e}"
        print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds; with --threads 1 on a busy machine")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, medians of {arguments.repeats}")
    for title, make in MODELS.items():
        print(title, flush=True)
        compare(make, arguments.repeats, clock(cpu_time=arguments.cpu_time))
