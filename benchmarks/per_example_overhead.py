"""What a step costs that the per-example probe measures, beside a plain one, in the same run.

Small transformers at three shapes, with attention made of Linear layers and with ``nn.MultiheadAttention``. Plain
and measured steps take turns. Last, what the look costs whether examples mix, which the first measured step takes. Run
it with ``python benchmarks/per_example_overhead.py`` where lightning_wn is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_wn.per_example import find_mixing
from lightning_wn.probes import BatchCount, MeasuredParameters, PerExampleProbe


class LinearAttention(nn.Module):
    """Multi-head attention out of two Linear layers."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention`` as self-attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Block(nn.Module):
    """Attention and MLP with residuals."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def clock(*, cpu_time: bool) -> Callable[[], float]:
    """Choose the wall clock, or the CPU seconds of all threads, for one thread on a machine that others use too."""
    return time.process_time if cpu_time else time.perf_counter


def transformer(attention: type[nn.Module], width: int, layers: int) -> nn.Module:
    """Build a language model."""
    blocks = [Block(width, attention(width)) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(512, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 512))


def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean over all tokens."""
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def look_for_mixing(
    attention: type[nn.Module], width: int, layers: int, batch: int, length: int, *, repeats: int,
    now: Callable[[], float],
) -> tuple[float, float]:  # fmt: skip
    """Return the median seconds of a plain forward and backward pass, and of a look whether examples mix."""
    model = transformer(attention, width, layers)
    tokens = torch.randint(0, 512, (batch, length + 1))
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for looks in (False, True):
            start = now()
            if looks:
                assert find_mixing(model, language_loss, tokens, batch).outcome.value == "separate"
            else:
                model.zero_grad()
                language_loss(model, tokens).backward()
            times[looks].append(now() - start)
    return statistics.median(times[False]), statistics.median(times[True])


def medians(
    attention: type[nn.Module], width: int, layers: int, batch: int, length: int, *, repeats: int,
    now: Callable[[], float],
) -> tuple[float, float]:  # fmt: skip
    """Return the median seconds of a plain and of a measured step."""
    model = transformer(attention, width, layers)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    tokens = torch.randint(0, 512, (batch, length + 1))
    probe, measured_parameters = PerExampleProbe(), MeasuredParameters(parameters)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 3):
        for measured in (False, True):
            start = now()
            if measured:
                probe.begin(0, 1, model, measured_parameters)
                probe.before_forward(BatchCount(batch))
            loss = language_loss(model, tokens)
            optimizer.zero_grad()
            if measured:
                probe.before_backward(loss)
            loss.backward()
            if measured:
                probe.after_backward(batch, 1.0, None)
                samples = probe.finish(None, full=True)
                assert samples is not None
                samples.to_row()
            optimizer.step()
            times[measured].append(now() - start)
    probe.detach()
    # the first steps verify themselves and fill the caches
    return statistics.median(times[False][3:]), statistics.median(times[True][3:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds; with --threads 1 on a busy machine")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    cadence = PerExampleProbe.default_every_n_steps
    print(f"torch {torch.__version__}, {arguments.threads} threads, medians of {arguments.repeats}")
    for attention in (LinearAttention, TorchAttention):
        print(attention.__doc__)
        for width, layers, batch, length in ((256, 6, 8, 128), (512, 3, 8, 64), (256, 4, 4, 512)):
            plain, measured = medians(
                attention, width, layers, batch, length, repeats=arguments.repeats,
                now=clock(cpu_time=arguments.cpu_time),
            )  # fmt: skip
            print(
                f"  d={width}, {layers} layers, {batch}x{length} tokens: plain {plain * 1e3:6.1f} ms, measured "
                f"{measured * 1e3:6.1f} ms, {measured / plain:.3f}x; one step in {cadence}: "
                f"{1 + (measured / plain - 1) / cadence:.4f}x",
                flush=True,
            )
        plain, looked = look_for_mixing(
            attention, 256, 6, 8, 128, repeats=max(arguments.repeats // 5, 3), now=clock(cpu_time=arguments.cpu_time)
        )
        print(
            f"  d=256, 6 layers, 8x128 tokens: a look whether examples mix, once for each way in which layers are "
            f"used: {looked * 1e3:6.1f} ms, {looked / plain:.1f} plain passes",
            flush=True,
        )
