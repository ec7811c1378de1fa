"""What a step costs that the per-example probe measures, beside a plain one, in the same run.

Small transformers at three shapes, with attention made of Linear layers (each has a closed form) and with
``nn.MultiheadAttention`` (which is run again example by example). Plain and measured steps take turns. Run it
with ``python benchmarks/per_example_overhead.py`` where lightning_wn is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from torch import Tensor, nn

from lightning_wn.noise_scale.batch_counting import BatchCount
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.probes.per_example.probe import PerExampleProbe


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


class TorchAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` as self-attention."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # self-attention has one input
        return super().forward(x, x, x, need_weights=False)[0]


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


def benchmark(attention: type[nn.Module], width: int, layers: int, batch: int, length: int, repeats: int) -> None:
    blocks = [Block(width, attention(width)) for _ in range(layers)]
    model = nn.Sequential(nn.Embedding(512, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 512))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    tokens = torch.randint(0, 512, (batch, length + 1))
    probe, measured_parameters = PerExampleProbe(), MeasuredParameters(parameters)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 3):
        for measured in (False, True):
            start = time.perf_counter()
            if measured:
                probe.begin(0, 1, model, measured_parameters)
                probe.before_forward(BatchCount(batch))
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
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
            times[measured].append(time.perf_counter() - start)
    probe.detach()
    plain, with_probe = (statistics.median(values[3:]) for values in times.values())
    ratio, cadence = with_probe / plain, probe.default_every_n_steps
    print(
        f"  d={width}, {layers} layers, {batch}x{length} tokens: plain {plain * 1e3:6.1f} ms, measured "
        f"{with_probe * 1e3:6.1f} ms, {ratio:.3f}x; one step in {cadence}: {1 + (ratio - 1) / cadence:.4f}x"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    for attention in (LinearAttention, TorchAttention):
        print(attention.__doc__)
        for shape in ((256, 6, 8, 128), (512, 3, 8, 64), (256, 4, 4, 512)):
            benchmark(attention, *shape, arguments.repeats)
