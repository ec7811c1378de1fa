"""Models as people bring them, small: of real packages and of the kinds that are trained with Lightning.

Each function returns a LightningModule that trains at learning rate zero without dropout, and a few batches. What an
example is, where one can be cut out of a batch, is ``cut(batch, index)``; None where examples belong together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F  # as torch's own documentation spells it
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

BATCH, STEPS = 6, 4


@dataclass
class Case:
    """One model with its data."""

    model: L.LightningModule
    batches: list[Any]
    cut: Callable[[Any, int], Any] | None = None
    batch_size_fn: Callable[[Any], Any] | None = None


class Loss(L.LightningModule):
    """A network, and a function from it and a batch to the loss."""

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def rows(batch: Any, index: int) -> Any:
    """Cut one row out of all tensors of a batch."""
    if isinstance(batch, dict):
        return {key: value[index : index + 1] for key, value in batch.items()}
    return type(batch)(part[index : index + 1] for part in batch)


def _draw(make: Callable[[], Any]) -> list[Any]:
    return [make() for _ in range(STEPS)]


# ---------------------------------------------------------------- transformers


def _small(kind: str, **settings: Any) -> tuple[Any, Any]:
    """Return a configuration of transformers, and the package."""
    import transformers

    warnings.filterwarnings("ignore", module="transformers")
    sizes = {
        "vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return getattr(transformers, kind)(**(sizes | settings)), transformers


def _own_loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return net(**batch).loss


def _words(length: int = 5) -> dict[str, Tensor]:
    tokens = torch.randint(0, 19, (BATCH, length))
    return {"input_ids": tokens, "labels": torch.randint(0, 19, (BATCH, length))}


def bert() -> Case:
    """BERT with its language-model head, whose bias is held twice."""
    config, transformers = _small("BertConfig", max_position_embeddings=16)
    return Case(Loss(transformers.BertForMaskedLM(config), _own_loss), _draw(_words), rows)


def t5() -> Case:
    """T5, whose layers share a table of relative positions."""
    config, transformers = _small(
        "T5Config", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    return Case(Loss(transformers.T5ForConditionalGeneration(config), _own_loss), _draw(_words), rows)


def gpt2() -> Case:
    """GPT-2, whose head is its embedding."""
    config, transformers = _small(
        "GPT2Config", n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return Case(Loss(transformers.GPT2LMHeadModel(config), _own_loss), _draw(_words), rows)


def llama() -> Case:
    """Llama."""
    config, transformers = _small("LlamaConfig", num_key_value_heads=1)
    return Case(Loss(transformers.LlamaForCausalLM(config), _own_loss), _draw(_words), rows)


def mixture_of_experts() -> Case:
    """Mixtral with its balancing loss, which is of the whole batch."""
    config, transformers = _small(
        "MixtralConfig", num_key_value_heads=1, num_local_experts=3, output_router_logits=True, router_jitter_noise=0.0
    )
    return Case(Loss(transformers.MixtralForCausalLM(config), _own_loss), _draw(_words))


class Mixup:
    """Mixes images and labels of a batch with those of its reverse, as timm's class of this name does."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.rand(())
        targets = F.one_hot(labels, 4).float()
        return share * images + (1 - share) * images.flip(0), share * targets + (1 - share) * targets.flip(0)


class WithMixup(Loss):
    """Mixes in its training step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, None)
        self.mixup = Mixup()

    def training_step(self, batch, batch_idx):
        images, targets = self.mixup(*batch)
        return F.cross_entropy(self.net(pixel_values=images).logits, targets)


def _images(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, size, size), torch.randint(0, 4, (BATCH,))


def vit() -> Case:
    """A vision transformer with mixup."""
    config, transformers = _small("ViTConfig", image_size=8, patch_size=4, num_labels=4)
    return Case(WithMixup(transformers.ViTForImageClassification(config)), _draw(_images))


def convnext() -> Case:
    """A ConvNeXt with mixup."""
    config, transformers = _small(
        "ConvNextConfig", depths=[1, 1], hidden_sizes=[8, 12], num_stages=2, patch_size=2, num_labels=4
    )
    return Case(WithMixup(transformers.ConvNextForImageClassification(config)), _draw(_images))


def resnet() -> Case:
    """A ResNet with BatchNorm."""
    config, transformers = _small(
        "ResNetConfig", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4
    )
    net = transformers.ResNetForImageClassification(config)
    return Case(Loss(net, lambda net, b: F.cross_entropy(net(pixel_values=b[0]).logits, b[1])), _draw(_images))


# ---------------------------------------------------------------- kinds


def simclr() -> Case:
    """A contrastive loss over two views of a batch."""

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        first, second = (F.normalize(net(view.flatten(1)), dim=1) for view in batch)
        return F.cross_entropy(first @ second.T / 0.2, torch.arange(len(first)))

    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    return Case(Loss(net, loss), _draw(lambda: (torch.randn(BATCH, 12), torch.randn(BATCH, 12))))


class GraphConvolution(nn.Module):
    """Kipf & Welling's layer: mixes each node with its neighbours."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.linear(x)


class GraphNet(nn.Module):
    """Two graph convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphConvolution(5, 8), GraphConvolution(8, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.second(self.first(x, adjacency).tanh(), adjacency)


def _ring(nodes: int) -> Tensor:
    eye = torch.eye(nodes)
    return (eye + eye.roll(1, 0) + eye.roll(-1, 0)) / 3


def graph_by_nodes() -> Case:
    """A loss over the nodes of one graph after the other."""

    def make() -> dict[str, Tensor]:
        return {"x": torch.randn(9, 5), "y": torch.randint(0, 3, (9,)), "adjacency": _ring(9)}

    return Case(Loss(GraphNet(), lambda net, b: F.cross_entropy(net(b["x"], b["adjacency"]), b["y"])), _draw(make))


class GraphBatch:
    """Graphs of different sizes, joined as PyTorch Geometric joins them."""

    def __init__(self) -> None:
        sizes = torch.randint(3, 7, (BATCH,))
        self.x = torch.randn(int(sizes.sum()), 5)
        self.adjacency = torch.block_diag(*(_ring(int(size)) for size in sizes))
        self.batch = torch.arange(BATCH).repeat_interleave(sizes)
        self.y = torch.randint(0, 3, (BATCH,))
        self.num_graphs = BATCH


def graphs() -> Case:
    """A loss over graphs."""

    def loss(net: nn.Module, batch: GraphBatch) -> Tensor:
        nodes = net(batch.x, batch.adjacency)
        return F.cross_entropy(torch.zeros(BATCH, 3).index_add(0, batch.batch, nodes), batch.y)

    return Case(Loss(GraphNet(), loss), _draw(GraphBatch))


class Packed(nn.Module):
    """An LSTM over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][0])


def packed_lstm() -> Case:
    """Sequences that are packed."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(BATCH, 7, 4), torch.randint(1, 8, (BATCH,)), torch.randint(0, 3, (BATCH,))

    return Case(Loss(Packed(), lambda net, b: F.cross_entropy(net(b[0], b[1]), b[2])), _draw(make), rows)


class SequenceFirst(nn.Module):
    """A transformer as torch builds it by default, with as many positions as examples."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x.transpose(0, 1)).transpose(0, 1)


def sequence_first() -> Case:
    """T == B."""

    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(BATCH, BATCH, 8), torch.randn(BATCH, BATCH, 8)

    return Case(Loss(SequenceFirst(), lambda net, b: F.mse_loss(net(b[0]), b[1])), _draw(make), rows)


def physics_informed() -> Case:
    """A loss of the network's derivative by its input."""

    def loss(net: nn.Module, batch: tuple[Tensor]) -> Tensor:
        x = batch[0].clone().requires_grad_()
        u = net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope[:, 0] + u[:, 0] * x[:, 1]).square().mean()

    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    return Case(Loss(net, loss), _draw(lambda: (torch.randn(BATCH, 2),)), rows)


class GAN(L.LightningModule):
    """Two networks, two optimizers, manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def generator_loss(self, batch):
        return F.softplus(-self.discriminator(self.generator(batch[0]))).mean()

    def discriminator_loss(self, batch):
        noise, real = batch
        fake = self.generator(noise).detach()
        return F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()

    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), (self.generator_loss, self.discriminator_loss), strict=True):
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.0) for net in (self.generator, self.discriminator)]


def gan() -> Case:
    """A generator and a discriminator."""
    return Case(GAN(), _draw(lambda: (torch.randn(BATCH, 3), torch.randn(BATCH, 4))))


CASES: tuple[Callable[[], Case], ...] = (
    bert, t5, gpt2, llama, mixture_of_experts, vit, convnext, resnet, simclr, graph_by_nodes, graphs, packed_lstm,
    sequence_first, physics_informed, gan,
)  # fmt: skip
