"""The data and the model of the language-model example: Python's own source, character by character."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

VOCABULARY = 128  # ASCII; the last code stands for everything else
WARM_UP = 0.02
# tests are long and repeat themselves, the other two are tables; a Python without its tests has the same corpus
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_HELD_OUT = 12


@functools.cache
def standard_library() -> tuple[Tensor, Tensor]:
    """The standard library's source to train on, and every 12th file of it held out, as ASCII codes."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(root.rglob("*.py")) if not _LEFT_OUT.intersection(file.relative_to(root).parts)]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, file in enumerate(files):
        parts[i % _HELD_OUT == 0].append(file.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train.clamp(max=VOCABULARY - 1), held_out.clamp(max=VOCABULARY - 1)


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Stretches of text that do not overlap, and the same shifted by one character.

    Args:
        text: Codes of characters.
        length: Characters in a sequence.
    """

    def __init__(self, text: Tensor, length: int) -> None:
        self.text = text
        self.length = length
        self.window = torch.arange(length + 1)

    def __len__(self) -> int:
        """How many fit into the text."""
        return (len(self.text) - 1) // self.length

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: (sequences, length), twice."""
        codes = self.text[torch.tensor(indices).unsqueeze(1) * self.length + self.window].long()
        return codes[:, :-1], codes[:, 1:]


def train_dataloader(sequences: Sequences, budget: int, batch_size: int, seed: int) -> DataLoader[Any]:
    """A loader of ``budget`` different sequences, in an order that the seed alone decides.

    A longer budget begins with the same sequences, and the batch size cuts the same stream.
    """
    if budget > len(sequences):
        raise ValueError(
            f"`budget` is {budget:,} sequences, but this Python's standard library has {len(sequences):,} of "
            f"{sequences.length} characters; lower it."
        )
    order = RandomSampler(sequences, num_samples=budget, generator=torch.Generator().manual_seed(seed))
    return DataLoader(sequences, batch_size=batch_size, sampler=order, drop_last=True, collate_fn=lambda batch: batch)


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.inputs(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


class CharacterModel(pl.LightningModule):
    """A small transformer that predicts the next character.

    The loss is a mean over the sequences of a batch, which are equally long: what the noise scale needs.

    Args:
        learning_rate: The highest that Adam is given, after the warm-up.
        length: Characters in a sequence.
        width: Numbers for each character.
        layers: Blocks.
        heads: Attention heads of a block.
    """

    def __init__(self, learning_rate: float, *, length: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.characters, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, codes: Tensor) -> Tensor:
        # one row of positions for each sequence, so that each has a gradient of its own
        places = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
        return self.head(self.norm(self.blocks(self.characters(codes) + self.positions(places))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam; the learning rate rises for 2 % of the data and then falls in a straight line to 0."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), fused=True)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.0, min((step + 1) / (WARM_UP * steps), 1 - step / steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def losses(model: nn.Module, sequences: Sequences, count: int, stride: int = 1) -> Tensor:
    """The mean loss of one in ``stride`` of the first ``count`` sequences each, in nat per character."""
    model.eval()
    found = []
    for start in range(0, count, 256 * stride):
        codes, following = sequences.__getitems__(range(start, min(start + 256 * stride, count), stride))
        found.append(nn.functional.cross_entropy(model(codes).transpose(1, 2), following, reduction="none").mean(1))
    model.train()
    return torch.cat(found)
