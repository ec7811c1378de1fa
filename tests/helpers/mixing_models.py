"""Small models and losses whose examples mix, and such whose examples do not.

Each case is a function without arguments that returns a :class:`Case`. A case that mixes names the tests that are to
see it, each alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_wn import apply_weight_norm

B, T, E, C = 6, 5, 8, 3

SWAP, SECOND, ALONE = "finite swap", "second derivative", "alone"


@dataclass
class Case:
    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Any]
    batch: Any
    batch_size: int = B
    options: dict[str, Any] = field(default_factory=dict)


MIXING: dict[str, tuple[Callable[[], Case], tuple[str, ...]]] = {}
SEPARATE: dict[str, Callable[[], Case]] = {}


def mixes(*tests):
    def register(function):
        MIXING[function.__name__] = (function, tests)
        return function

    return register


def separate(function):
    SEPARATE[function.__name__] = function
    return function


class Function(nn.Module):
    """A model whose forward is a function of its layers and the input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def features(*shape):
    return torch.randn(*(shape or (B, 4)))


def classes(*shape):
    return torch.randint(0, C, shape or (B,))


def cross_entropy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def per_class(model, batch):
    """Positions have a class each."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def supervised(model, *shape, loss=cross_entropy, **options):
    return Case(model, loss, (features(*shape), classes()), options=options)


def perceptron(middle=None, *, activation=None):
    return nn.Sequential(nn.Linear(4, E), *([middle] if middle else []), activation or nn.ReLU(), nn.Linear(E, C))


def of_outputs(loss, outputs=C, activation=None):
    """An MLP with this loss of all outputs and labels."""
    model = nn.Sequential(nn.Linear(4, E), activation or nn.ReLU(), nn.Linear(E, outputs))
    return Case(model, lambda net, batch: loss(net(batch[0]), batch[1]), (features(), classes()))


def adjacency():
    return torch.eye(B) + 0.5 * torch.eye(B).roll(1, 1) + 0.3 * torch.eye(B).roll(2, 0)


# -- mixes -------------------------------------------------------------------------------------------------------------


@mixes(SWAP, SECOND)
def batch_norm():
    return supervised(perceptron(nn.BatchNorm1d(E)))


@mixes(SWAP, SECOND, ALONE)
def centred_over_the_batch():
    return supervised(perceptron(Function(lambda m, x: x - x.mean(0))))


@mixes(SWAP, ALONE)
def detached_statistics():
    return supervised(
        perceptron(Function(lambda m, x: (x - x.mean(0).detach()) / (1 + x.std(0).detach().nan_to_num())))
    )


@mixes(SWAP)
def detached_scale_of_the_loss():
    return of_outputs(lambda o, y: (F.cross_entropy(o, y, reduction="none") * F.softmax(o[:, 0].detach(), 0)).sum())


def graph_network(activation=None):
    return Function(
        lambda m, x, a: a @ m.b(m.f(a @ m.a(x))), a=nn.Linear(4, E), b=nn.Linear(E, C), f=activation or nn.ReLU()
    )


def on_graph(model, loss):
    batch = {"x": features(), "adj": adjacency(), "y": classes()}
    return Case(model, lambda net, d: loss(net(d["x"], d["adj"]), d["y"]), batch)


@mixes(SWAP, SECOND)
def message_passing():
    return on_graph(graph_network(), F.cross_entropy)


@mixes(SWAP, SECOND)
def message_passing_by_index():
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])

    def convolve(m, x, e):
        h = m.a(x)
        return m.b(F.relu(h.index_add(0, e[1], h[e[0]])))

    model = Function(convolve, a=nn.Linear(4, E), b=nn.Linear(E, C))
    return Case(
        model,
        lambda net, d: F.cross_entropy(net(d["x"], d["e"]), d["y"]),
        {"x": features(), "e": edges, "y": classes()},
    )


@mixes(SWAP, SECOND)
def message_passing_with_a_linear_loss():
    return on_graph(graph_network(), lambda o, y: o.mean())


@mixes(SWAP, SECOND)
def message_passing_with_l1():
    return on_graph(graph_network(), lambda o, y: (o - y[:, None]).abs().mean())


@mixes(SWAP, SECOND)
def message_passing_with_hinge():
    return on_graph(graph_network(), lambda o, y: F.relu(1 - o * (2 * y[:, None] - 1)).mean())


@mixes(SECOND)
def one_message_and_a_linear_loss():
    return on_graph(Function(lambda m, x, a: a @ m.a(x), a=nn.Linear(4, 1)), lambda o, y: o.mean())


@mixes(SWAP)
def one_message_and_hinge():
    return on_graph(
        Function(lambda m, x, a: a @ m.a(x), a=nn.Linear(4, 1)),
        lambda o, y: F.relu(1 - o * (2 * y[:, None] - 1)).mean(),
    )


def normalized(o):
    return F.normalize(o, dim=1)


@mixes(SWAP, SECOND)
def contrastive():
    model = perceptron()
    views = features(), features()

    def loss(net, batch):
        sim = normalized(net(batch[0])) @ normalized(net(batch[1])).T / 0.2
        return F.cross_entropy(sim, torch.arange(B if len(sim) == B else len(sim)))

    return Case(model, loss, views)


@mixes(SWAP, SECOND)
def contrastive_of_tokens():
    model = Function(lambda m, t: m.fc(m.emb(t).mean(1)), emb=nn.Embedding(9, E), fc=nn.Linear(E, E))

    def loss(net, tokens):
        z = normalized(net(tokens))
        return F.cross_entropy(z @ z.T, torch.arange(len(z)).roll(1))

    return Case(model, loss, torch.randint(0, 9, (B, T)))


@mixes(SWAP, SECOND)
def supervised_contrastive():
    def loss(o, y):
        sim = normalized(o) @ normalized(o).T
        same = (y[:, None] == y[None]).float()
        return -(same * sim.log_softmax(1)).sum() / same.sum()

    return of_outputs(loss)


@mixes(SWAP)
def hardest_triplets():
    def loss(o, y):
        d = torch.cdist(o, o)
        same = torch.arange(len(o)) % 2
        same = same[:, None] == same[None]
        return F.relu(d.masked_fill(~same, 0).amax(1) - d.masked_fill(same, 1e9).amin(1) + 1.0).mean()

    return of_outputs(loss)


@mixes(SWAP, ALONE)
def ranking_by_hinge():
    """All pairs are within the margin, so the loss is linear there."""

    def loss(o, y):
        target = torch.arange(len(o), dtype=o.dtype)
        s = 0.05 * o[:, 0]
        return F.relu(1 - (s[:, None] - s[None]))[target[:, None] > target[None]].sum() / len(s) ** 2

    return of_outputs(loss)


@mixes(SWAP, SECOND)
def ranking_by_logistic():
    return of_outputs(lambda o, y: F.softplus(o[:, None, 0] - o[None, :, 0]).triu(1).sum())


@mixes(SWAP, SECOND)
def root_of_the_mean():
    return of_outputs(lambda o, y: (o - y[:, None]).square().mean().sqrt())


@mixes(SWAP, SECOND)
def variance_of_the_batch():
    return of_outputs(lambda o, y: F.relu(1 - o.std(0)).mean() + 0.1 * o.square().mean())


@mixes(SWAP, SECOND)
def cross_correlation():
    def loss(o, y):
        c = o.T @ o.tanh() / len(o)
        return (c - torch.eye(C)).square().sum()

    return of_outputs(loss)


@mixes(SWAP, SECOND)
def distributionally_robust():
    return of_outputs(lambda o, y: torch.logsumexp(F.cross_entropy(o, y, reduction="none"), 0))


@mixes(SWAP, SECOND)
def dice_of_the_batch():
    def loss(o, y):
        p, t = o.sigmoid(), F.one_hot(y, C)
        return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())

    return of_outputs(loss)


@mixes(SWAP, SECOND)
def discrepancy_of_two_halves():
    return of_outputs(lambda o, y: (o[: len(o) // 2].mean(0) - o[len(o) // 2 :].mean(0)).square().sum())


@mixes(SWAP)
def hard_examples_only():
    return of_outputs(lambda o, y: F.cross_entropy(o, y, reduction="none").topk(max(len(o) // 2, 1)).values.mean())


@mixes(SWAP)
def median_of_the_batch():
    return of_outputs(lambda o, y: (o - o.median(0).values.detach()).abs().mean() + 0.1 * o.square().mean())


@mixes(SWAP)
def hinge_to_the_mean():
    return of_outputs(lambda o, y: F.relu(0.3 - (o[:, 0] - o[:, 1].mean())).mean(), outputs=2)


@mixes(SWAP, SECOND)
def relativistic_critic():
    return of_outputs(lambda o, y: F.softplus(-(o[:, 0] - o[:, 1].mean())).mean(), outputs=2)


@mixes(SWAP)
def largest_of_the_batch_is_the_scale():
    return supervised(perceptron(Function(lambda m, x: x / x.detach().abs().max())))


def sequence_first(dropout):
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout, batch_first=False)
    model = Function(lambda m, x: m.fc(m.layer(m.a(x))), a=nn.Linear(4, E), layer=layer, fc=nn.Linear(E, C))
    return Case(model, per_class, (features(B, B, 4), classes(B, B)))


@mixes(SWAP, SECOND)
def sequence_first_with_as_many_steps():
    return sequence_first(0.0)


@mixes(SWAP, SECOND)
def sequence_first_with_dropout():
    return sequence_first(0.2)


class Attention(nn.Module):
    """Self-attention on Torch's default kernel, over dimension 1, or over the batch."""

    def __init__(self, *, over_batch=False, dropout=0.0):
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.over_batch, self.dropout = over_batch, dropout

    def forward(self, x, mask=None):
        q, k, v = (p.unflatten(-1, (2, -1)) for p in self.qkv(x).chunk(3, -1))
        order = (1, 2, 0, 3) if self.over_batch else (0, 2, 1, 3)
        q, k, v = (p.permute(order) for p in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        o = o.permute(2, 0, 1, 3) if self.over_batch else o.transpose(1, 2)
        return self.out(o.flatten(2))


@mixes(SWAP, SECOND)
def attention_over_the_batch():
    model = nn.Sequential(nn.Linear(4, E), Attention(over_batch=True), nn.Linear(E, C))
    return Case(model, per_class, (features(B, T, 4), classes(B, T)))


@mixes(SWAP, SECOND)
def attention_over_the_batch_with_dropout():
    model = nn.Sequential(nn.Linear(4, E), Attention(over_batch=True, dropout=0.3), nn.Linear(E, C))
    return Case(model, per_class, (features(B, T, 4), classes(B, T)))


@mixes(SWAP, SECOND)
def recurrent_over_the_batch():
    model = Function(
        lambda m, x: m.fc(m.rnn(m.a(x))[0]), a=nn.Linear(4, E), rnn=nn.GRU(E, E, batch_first=False), fc=nn.Linear(E, C)
    )
    return Case(model, per_class, (features(B, T, 4), classes(B, T)))


@mixes(SWAP, SECOND, ALONE)
def second_branch():
    model = Function(
        lambda m, x: m.fc(F.relu(m.a(x)) + m.g(x).tanh().mean(0)),
        a=nn.Linear(4, E), g=nn.Linear(4, E), fc=nn.Linear(E, C),
    )  # fmt: skip
    return supervised(model)


@mixes(SWAP)
def second_branch_in_the_loss():
    model = Function(lambda m, x: (m.a(x), m.g(x)), a=nn.Linear(4, C), g=nn.Linear(4, 1))

    def loss(net, batch):
        o, g = net(batch[0])
        return F.cross_entropy(o, batch[1]) + 0.01 * (g - g.mean()).abs().mean()

    return Case(model, loss, (features(), classes()))


class Experts(nn.Module):
    """Each example goes to one expert, and waits if that one is full."""

    def __init__(self, capacity=None):
        super().__init__()
        self.a, self.gate = nn.Linear(4, E), nn.Linear(E, 2)
        self.experts = nn.ModuleList([nn.Linear(E, C) for _ in range(2)])
        self.capacity = capacity
        self.balance = None

    def forward(self, x):
        h = F.relu(self.a(x))
        p = self.gate(h).softmax(1)
        top = p.argmax(1)
        self.balance = 2 * (F.one_hot(top, 2).float().mean(0) * p.mean(0)).sum()
        o = torch.zeros(len(x), C)
        for e, expert in enumerate(self.experts):
            rows = (top == e).nonzero()[:, 0][: self.capacity]
            o = o.index_add(0, rows, expert(h[rows]) * p[rows, e, None])
        return o


@mixes(SWAP)
def experts_with_a_balancing_loss():
    return supervised(Experts(), loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]) + 0.01 * net.balance)


@mixes(SWAP)
def experts_that_are_full():
    return supervised(Experts(capacity=2))


@mixes(SWAP, SECOND)
def rows_mixed_inside():
    """Manifold mixup: each hidden row with a random other one."""
    return supervised(perceptron(Function(lambda m, x: 0.8 * x + 0.2 * x[torch.randperm(len(x))])))


@mixes(SWAP)
def inputs_standardized_by_batch():
    return supervised(Function(lambda m, x: m.fc((x - x.mean(0)) / x.std(0)), fc=nn.Linear(4, C)))


@mixes(SWAP, SECOND)
def table_of_positions_behind_an_operation():
    """With as many positions as examples, the table's rows look like examples."""
    table = nn.Embedding(2 * B, 2)
    places = torch.arange(B)[:, None] - torch.arange(B)[None] + B

    return Case(
        Function(lambda m, x: m.fc(m.attention(m.a(x), m.mask())), a=nn.Linear(4, E), attention=Attention(),
                 fc=nn.Linear(E, C), mask=Function(
                     lambda m: m.table(places).permute(2, 0, 1).masked_fill(torch.ones(B, B).triu(1).bool(), -1e9),
                     table=table)),
        per_class, (features(B, B, 4), classes(B, B)), options={"batch_dims": {"mask.table": 0}},
    )  # fmt: skip


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2 * ctx.saved_tensors[0]


@mixes(SWAP)
def without_second_derivative():
    return of_outputs(lambda o, y: OnceDifferentiable.apply(o).mean().sqrt())


@mixes(SWAP, SECOND)
def compiled():
    model = perceptron(Function(lambda m, x: x - x.mean(0)))
    return supervised(torch.compile(model))


def in_bfloat16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model, batch)


@mixes(SWAP, SECOND)
def centred_under_autocast():
    return supervised(perceptron(Function(lambda m, x: x - x.mean(0))), loss=in_bfloat16)


def checkpointed(middle, reentrant):
    return Function(
        lambda m, x: m.fc(checkpoint(m.body, m.a(x), use_reentrant=reentrant)),
        a=nn.Linear(4, E), body=nn.Sequential(nn.Linear(E, E), middle, nn.ReLU(), nn.Linear(E, E)), fc=nn.Linear(E, C),
    )  # fmt: skip


@mixes(SWAP, SECOND)
def centred_in_a_checkpoint():
    return supervised(checkpointed(Function(lambda m, x: x - x.mean(0)), False))


@mixes(SWAP)
def centred_in_a_reentrant_checkpoint():
    return supervised(checkpointed(Function(lambda m, x: x - x.mean(0)), True))


@mixes(SWAP, ALONE)
def centred_with_dropout():
    return supervised(perceptron(nn.Sequential(Function(lambda m, x: x - x.mean(0).detach()), nn.Dropout(0.3))))


@mixes(SWAP, SECOND)
def survival():
    """Cox's partial likelihood: each example against those that are still at risk."""
    return of_outputs(lambda o, y: (torch.logcumsumexp(o[:, 0], 0) - o[:, 0]).mean())


@mixes(SWAP)
def assignments_balanced_over_the_batch():
    def loss(o, y):
        with torch.no_grad():
            q = (o / 0.1).exp()
            for _ in range(3):
                q = q / q.sum(0)
                q = q / q.sum(1, keepdim=True)
        return -(q * o.log_softmax(1)).sum(1).mean()

    return of_outputs(loss)


@mixes(SWAP)
def sorted_outputs():
    return of_outputs(lambda o, y: (o.sort(0).values - torch.linspace(-1, 1, len(o))[:, None]).square().mean())


@mixes(SWAP)
def targets_against_all_outputs():
    """(B,) beside (B, 1) broadcasts to (B, B)."""
    return Case(perceptron(), lambda net, b: (net(b[0])[:, 0] - b[1]).square().mean(), (features(), features(B, 1)))


@mixes(SWAP)
def advantages_standardized():
    def loss(net, batch):
        x, action, advantage = batch
        advantage = (advantage - advantage.mean()) / advantage.std()
        return -(net(x).log_softmax(1).gather(1, action[:, None])[:, 0] * advantage).mean()

    return Case(perceptron(), loss, (features(), classes(), features(B)))


# -- does not mix ------------------------------------------------------------------------------------------------------


@separate
def mlp():
    return supervised(perceptron())


@separate
def two_examples():
    return Case(perceptron(), cross_entropy, (features(2, 4), classes(2)), 2)


@separate
def class_weights():
    return of_outputs(lambda o, y: F.cross_entropy(o, y, weight=torch.tensor([0.2, 1.0, 3.0])))


@separate
def label_smoothing():
    return of_outputs(lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1))


@separate
def weighted_mean():
    def loss(net, batch):
        x, y, w = batch
        return (w * F.cross_entropy(net(x), y, reduction="none")).sum() / w.sum()

    return Case(perceptron(), loss, (features(), classes(), torch.rand(B)))


def language_model(middle, loss):
    model = nn.Sequential(nn.Embedding(9, E, padding_idx=0), middle, nn.Linear(E, C))
    labels = classes(B, T)
    labels[torch.rand(B, T) < 0.3] = -100
    return Case(model, loss, (torch.randint(0, 9, (B, T)), labels))


@separate
def token_mean():
    return language_model(nn.LayerNorm(E), per_class)


@separate
def masked_mean_by_float_mask():
    def loss(net, batch):
        x, y, mask = batch
        return (mask * (net(x)[..., 0] - y).square()).sum() / mask.sum().clamp(min=1)

    return Case(nn.Sequential(nn.Linear(4, E), nn.Tanh(), nn.Linear(E, 1)), loss, (
        features(B, T, 4), features(B, T), (torch.rand(B, T) < 0.6).float()))  # fmt: skip


@separate
def two_means_of_different_counts():
    """A token mean and an example mean, as in BERT."""
    model = Function(
        lambda m, t: (m.tokens(m.emb(t)), m.fc(m.emb(t).mean(1))),
        emb=nn.Embedding(9, E), tokens=nn.Linear(E, C), fc=nn.Linear(E, 2),
    )  # fmt: skip
    labels = classes(B, T)
    labels[torch.rand(B, T) < 0.5] = -100

    def loss(net, batch):
        tokens, whole = net(batch["ids"])
        return F.cross_entropy(tokens.transpose(1, 2), batch["labels"]) + F.cross_entropy(whole, batch["next"])

    return Case(model, loss, {"ids": torch.randint(0, 9, (B, T)), "labels": labels, "next": classes() % 2})


@separate
def missing_targets_by_task():
    target = features(B, C)
    target[torch.rand(B, C) < 0.3] = torch.nan

    def loss(net, batch):
        x, y = batch
        known = torch.isfinite(y)
        error = torch.where(known, net(x) - y.nan_to_num(), 0.0).square()
        return (error.sum(0) / known.sum(0).clamp(min=1)).mean()

    return Case(perceptron(), loss, (features(), target))


@separate
def l1():
    return of_outputs(lambda o, y: (o - y[:, None]).abs().mean())


@separate
def hinge():
    return of_outputs(F.multi_margin_loss)


@separate
def critic():
    return of_outputs(lambda o, y: o.mean(), outputs=1)


@separate
def critic_with_as_many_outputs_as_examples():
    return of_outputs(lambda o, y: (o.t() * torch.arange(1.0, B + 1)[:, None]).mean(), outputs=B)


@separate
def centre_of_earlier_batches():
    """A statistic of this batch is used in the next one."""

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = perceptron(), perceptron().requires_grad_(False)
            self.register_buffer("centre", torch.zeros(1, C))

        def loss(self, x):
            taught = self.teacher(x)
            loss = -((taught - self.centre).softmax(1) * self.student(x).log_softmax(1)).sum(1).mean()
            self.centre = 0.9 * self.centre + 0.1 * taught.mean(0, keepdim=True)
            return loss

    return Case(Student(), lambda net, x: net.loss(x), features())


@separate
def nearest_codes():
    def forward(m, x):
        z = m.a(x)
        q = m.code(torch.cdist(z, m.code.weight).argmin(1))
        m.commitment = (q.detach() - z).square().mean() + (q - z.detach()).square().mean()
        return m.b(z + (q - z).detach())

    model = Function(forward, a=nn.Linear(4, E), code=nn.Embedding(B, E), b=nn.Linear(E, 4))
    return Case(model, lambda net, x: (net(x) - x).square().mean() + net.commitment, features())


@separate
def physics_informed():
    def loss(net, x):
        x = x.clone().requires_grad_()
        u = net(x)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        curvature = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)[0][:, 0]
        return (curvature + u[:, 0]).square().mean()

    return Case(nn.Sequential(nn.Linear(4, E), nn.Tanh(), nn.Linear(E, 1)), loss, features())


@separate
def diffusion():
    def loss(net, x):
        time, noise = torch.rand(len(x), 1), torch.randn_like(x)
        return (net(torch.cat([(1 - time) * x + time * noise, time], 1)) - noise).square().mean()

    return Case(nn.Sequential(nn.Linear(5, E), nn.SiLU(), nn.Linear(E, 4)), loss, features())


@separate
def focal():
    def loss(o, y):
        each = F.cross_entropy(o, y, reduction="none")
        return ((1 - (-each).exp()).square() * each).mean()

    return of_outputs(loss)


@separate
def largest_logit_subtracted():
    def loss(o, y):
        o = o - o.max().detach()
        return (o.exp().sum(1).log() - o.gather(1, y[:, None])[:, 0]).mean()

    return of_outputs(loss)


@separate
def sum_over_the_count():
    return of_outputs(lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(y))


@separate
def triplets_of_the_batch():
    """Each row is a triplet."""
    return Case(
        perceptron(), lambda net, batch: F.triplet_margin_loss(*(net(x) for x in batch)),
        (features(), features(), features()),
    )  # fmt: skip


@separate
def dropout():
    return supervised(perceptron(nn.Dropout(0.3)))


@separate
def spatial_dropout():
    model = nn.Sequential(nn.Conv2d(2, E, 3), nn.Dropout2d(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(E, C))
    return supervised(model, B, 2, 6, 6)


@separate
def stochastic_depth():
    return supervised(perceptron(Function(lambda m, x: x + F.relu(x) * (torch.rand(len(x), 1) < 0.5))))


@separate
def variational():
    model = Function(
        lambda m, x: m.enc(x).chunk(2, 1), enc=nn.Linear(4, 4), dec=nn.Linear(2, 4)
    )  # fmt: skip

    def loss(net, x):
        mean, log_var = net(x)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return (net.dec(z) - x).square().mean() - 0.5 * (1 + log_var - mean.square() - log_var.exp()).mean()

    return Case(model, loss, features())


def convolutional(*layers, out=E, shape=(6, 6)):
    return supervised(nn.Sequential(*layers, nn.Flatten(2), Function(lambda m, x: x.mean(2)), nn.Linear(out, C)),
                      B, 2, *shape)  # fmt: skip


@separate
def conv1d():
    return convolutional(nn.Conv1d(2, E, 3, padding=1), nn.GELU(), shape=(7,))


@separate
def conv2d_group_norm():
    return convolutional(nn.Conv2d(2, E, 3), nn.GroupNorm(2, E), nn.ReLU(inplace=True), nn.Conv2d(E, E, 3, groups=2))


@separate
def conv3d():
    return convolutional(nn.Conv3d(2, E, 2), nn.ReLU(), shape=(3, 3, 3))


@separate
def conv_transpose1d():
    return convolutional(nn.ConvTranspose1d(2, E, 3), nn.ReLU(), shape=(5,))


@separate
def conv_transpose2d():
    return convolutional(nn.ConvTranspose2d(2, E, 3), nn.InstanceNorm2d(E, affine=True), nn.ReLU())


@separate
def conv_transpose3d():
    return convolutional(nn.ConvTranspose3d(2, E, 2), nn.ReLU(), shape=(2, 3, 3))


@separate
def instance_norm():
    return convolutional(nn.Conv1d(2, E, 3), nn.InstanceNorm1d(E, affine=True), nn.ReLU(), shape=(7,))


@separate
def layer_norm():
    return supervised(perceptron(nn.LayerNorm(E)))


@separate
def rms_norm():
    return supervised(perceptron(nn.RMSNorm(E)))


@separate
def prelu():
    return supervised(perceptron(activation=nn.PReLU()))


@separate
def batch_norm_in_eval():
    return supervised(perceptron(nn.BatchNorm1d(E).eval()))


@separate
def bilinear():
    return Case(
        nn.Bilinear(4, 4, C), lambda net, b: F.cross_entropy(net(b[0], b[1]), b[2]), (features(), features(), classes())
    )


@separate
def tied_embedding():
    model = nn.Sequential(nn.Embedding(9, E), nn.Linear(E, 9, bias=False))
    model[1].weight = model[0].weight
    return Case(model, per_class, (torch.randint(0, 9, (B, T)), torch.randint(0, 9, (B, T))))


@separate
def embedding_bag():
    model = nn.Sequential(nn.EmbeddingBag(9, E), nn.Linear(E, C))
    return Case(model, cross_entropy, (torch.randint(0, 9, (B, T)), classes()))


@separate
def layer_used_twice():
    layer = nn.Linear(4, 4)
    return supervised(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, C)))


@separate
def frozen_part():
    model = perceptron()
    model[0].requires_grad_(False)
    return supervised(model)


@separate
def positions_as_many_as_examples():
    model = Function(
        lambda m, t: m.fc(m.tokens(t) + m.places(torch.arange(t.shape[1]))),
        tokens=nn.Embedding(9, E), places=nn.Embedding(B, E), fc=nn.Linear(E, C),
    )  # fmt: skip
    return Case(model, per_class, (torch.randint(0, 9, (B, B)), classes(B, B)))


@separate
def class_token_and_bare_positions():
    model = Function(
        lambda m, x: m.fc(m.attention(torch.cat((m.token.expand(len(x), 1, E), m.a(x)), 1) + m.places)[:, 0]),
        a=nn.Linear(4, E), attention=Attention(), fc=nn.Linear(E, C),
        token=nn.Parameter(torch.randn(1, 1, E)), places=nn.Parameter(torch.randn(T + 1, E)),
    )  # fmt: skip
    return supervised(model, B, T, 4)


def self_attention(batch_first=True, steps=T, dropout=0.0, **call):
    attention = nn.MultiheadAttention(E, 2, dropout, batch_first=batch_first)

    def forward(m, x):
        h = m.a(x)
        h = h if batch_first else h.transpose(0, 1)
        h = m.attention(h, h, h, **call)[0]
        return m.fc(h if batch_first else h.transpose(0, 1))

    model = Function(forward, a=nn.Linear(4, E), attention=attention, fc=nn.Linear(E, C))
    return Case(model, per_class, (features(B, steps, 4), classes(B, steps)))


@separate
def attention():
    return self_attention(need_weights=False)


@separate
def attention_with_as_many_steps_as_examples():
    return self_attention(steps=B)


@separate
def attention_inside_sequence_first():
    return self_attention(batch_first=False, steps=B)


@separate
def attention_with_dropout():
    return self_attention(dropout=0.3)


@separate
def attention_with_causal_mask():
    return self_attention(attn_mask=torch.ones(T, T).triu(1).bool())


@separate
def attention_with_padding_mask():
    lengths = torch.tensor([5, 3, 4, 2, 5, 1])
    return self_attention(key_padding_mask=torch.arange(T)[None] >= lengths[:, None], need_weights=False)


@separate
def attention_with_added_keys():
    case = self_attention()
    case.model.attention = nn.MultiheadAttention(E, 2, batch_first=True, add_bias_kv=True)
    return case


@separate
def default_attention_kernel():
    return Case(nn.Sequential(nn.Linear(4, E), Attention(), nn.Linear(E, C)), per_class, (
        features(B, T, 4), classes(B, T)))  # fmt: skip


@separate
def default_attention_kernel_with_dropout():
    return Case(nn.Sequential(nn.Linear(4, E), Attention(dropout=0.3), nn.Linear(E, C)), per_class, (
        features(B, T, 4), classes(B, T)))  # fmt: skip


@separate
def shared_mask_with_as_many_steps_as_examples():
    def loss(net, batch):
        h = net.attention(net.a(batch["x"]), batch["mask"])
        return F.cross_entropy(net.fc(h).flatten(0, 1), batch["y"].flatten())

    model = Function(None, a=nn.Linear(4, E), attention=Attention(), fc=nn.Linear(E, C))
    return Case(model, loss, {"x": features(B, B, 4), "mask": features(B, B), "y": classes(B, B)})


@separate
def relative_positions_added():
    places = torch.arange(B)[:, None] - torch.arange(B)[None] + B
    model = Function(
        lambda m, x: m.fc(m.attention(m.a(x), m.table(places).permute(2, 0, 1))),
        a=nn.Linear(4, E), attention=Attention(), table=nn.Embedding(2 * B, 2), fc=nn.Linear(E, C),
    )  # fmt: skip
    return Case(model, per_class, (features(B, B, 4), classes(B, B)))


@separate
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(E, 2, 16, 0.1, batch_first=True)
    model = nn.Sequential(nn.Linear(4, E), nn.TransformerEncoder(layer, 2), nn.Linear(E, C))
    return Case(model, per_class, (features(B, T, 4), classes(B, T)))


@separate
def sequence_first_told():
    case = sequence_first(0.1)
    names = [name for name, _ in case.model.named_modules() if "self_attn" not in name]
    case.loss_fn = lambda net, batch: F.cross_entropy(
        net(batch[0].transpose(0, 1)).transpose(0, 1).flatten(0, 1), batch[1].flatten()
    )
    case.options = {"batch_dims": dict.fromkeys(names, 1)}
    return case


def recurrent(kind, **options):
    model = Function(
        lambda m, x: m.fc(m.rnn(m.a(x))[0][:, -1]),
        a=nn.Linear(4, E), rnn=kind(E, E, batch_first=True, **options), fc=nn.Linear(E, C),
    )  # fmt: skip
    return supervised(model, B, T, 4)


@separate
def lstm():
    return recurrent(nn.LSTM, num_layers=2, dropout=0.2)


@separate
def gru():
    return recurrent(nn.GRU, bidirectional=False)


@separate
def lstm_of_packed_sequences():
    def forward(m, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(m.a(x), lengths, batch_first=True, enforce_sorted=False)
        return m.fc(m.rnn(packed)[1][0][-1])

    model = Function(forward, a=nn.Linear(4, E), rnn=nn.LSTM(E, E, batch_first=True), fc=nn.Linear(E, C))
    batch = features(B, T, 4), torch.tensor([5, 3, 4, 2, 5, 1]), classes()
    return Case(model, lambda net, d: F.cross_entropy(net(d[0], d[1]), d[2]), batch)


@separate
def lstm_cell():
    def forward(m, x):
        state = None
        for step in x.unbind(1):
            state = m.cell(step, state)
        return m.fc(state[0])

    return supervised(Function(forward, cell=nn.LSTMCell(4, E), fc=nn.Linear(E, C)), B, T, 4)


@separate
def weight_norm():
    model = perceptron()
    apply_weight_norm(model)
    return supervised(model)


@separate
def weight_norm_of_torch():
    model = perceptron()
    nn.utils.parametrizations.weight_norm(model[0])
    return supervised(model)


@separate
def legacy_weight_norm():
    model = perceptron()
    nn.utils.weight_norm(model[0])
    model(features()).sum()
    return supervised(model)


@separate
def spectral_norm():
    model = perceptron()
    nn.utils.parametrizations.spectral_norm(model[0])
    return supervised(model)


@separate
def in_a_checkpoint():
    return supervised(checkpointed(nn.Dropout(0.2), False))


@separate
def in_a_reentrant_checkpoint():
    return supervised(checkpointed(nn.Dropout(0.2), True))


@separate
def under_autocast():
    return supervised(perceptron(), loss=in_bfloat16)


@separate
def in_bfloat16_throughout():
    return Case(perceptron().bfloat16(), cross_entropy, (features().bfloat16(), classes()))


@separate
def in_float64():
    return Case(perceptron().double(), cross_entropy, (features().double(), classes()))


@separate
def compiled_alike():
    return supervised(torch.compile(perceptron()))


@separate
def changed_in_place():
    def forward(m, x):
        h = m.a(x)
        h += m.b(F.relu(h.clone()))
        return m.fc(h.relu_())

    return supervised(Function(forward, a=nn.Linear(4, E), b=nn.Linear(E, E), fc=nn.Linear(E, C)))


@separate
def learned_temperature_and_penalty():
    model = perceptron()
    model.scale = nn.Parameter(torch.zeros(()))

    def loss(net, batch):
        penalty = sum(p.square().sum() for p in net.parameters())
        return F.cross_entropy(net(batch[0]) * net.scale.exp(), batch[1]) + 0.01 * penalty + net.scale

    return supervised(model, loss=loss)


@separate
def soft_experts():
    model = Function(
        lambda m, x: (m.gate(x).softmax(1)[:, :, None] * torch.stack([m.a(x), m.b(x)], 1)).sum(1),
        gate=nn.Linear(4, 2), a=nn.Linear(4, C), b=nn.Linear(4, C),
    )  # fmt: skip
    return supervised(model)


@separate
def experts_without_balance():
    return supervised(Experts())


@separate
def distillation():
    teacher = perceptron().requires_grad_(False)
    model = Function(lambda m, x: (m.student(x), m.teacher(x)), student=perceptron(), teacher=teacher)

    def loss(net, batch):
        student, taught = net(batch[0])
        return F.kl_div(student.log_softmax(1), taught.softmax(1), reduction="batchmean")

    return supervised(model, loss=loss)


@separate
def gradient_penalty():
    def loss(net, x):
        x = x.clone().requires_grad_()
        score = net(x)
        slope = torch.autograd.grad(score.sum(), x, create_graph=True)[0]
        return score.mean() + ((slope.norm(dim=1) - 1).square()).mean()

    return Case(nn.Sequential(nn.Linear(4, E), nn.Tanh(), nn.Linear(E, 1)), loss, features())


@separate
def dictionary_output():
    model = Function(lambda m, x: {"logits": m.fc(x), "list": [m.b(x)]}, fc=nn.Linear(4, C), b=nn.Linear(4, 1))

    def loss(net, batch):
        out = net(batch["x"])
        return F.cross_entropy(out["logits"], batch["y"]) + out["list"][0].square().mean()

    return Case(model, loss, {"x": features(), "y": classes(), "names": ["a"] * B})


@separate
def batch_that_is_emptied():
    def loss(net, batch):
        y = batch.pop("y")
        batch["x"].mul_(2)
        return F.cross_entropy(net(batch["x"]), y)

    return Case(perceptron(), loss, {"x": features(), "y": classes()})


@separate
def ctc():
    model = nn.Linear(4, C + 1)
    targets, lengths = classes(B, 2) + 1, torch.full((B,), T)

    def loss(net, batch):
        log_p = net(batch[0]).log_softmax(2).transpose(0, 1)
        return F.ctc_loss(log_p, batch[1], lengths[: len(batch[1])], torch.full((len(batch[1]),), 2))

    return Case(model, loss, (features(B, T, 4), targets))


@separate
def complex_layer():
    model = Function(lambda m, x: m.b(m.a(x.to(torch.complex64)).abs()), a=nn.Linear(4, E, dtype=torch.complex64),
                     b=nn.Linear(E, C))  # fmt: skip
    return supervised(model)


@separate
def crops_folded():
    model = perceptron()

    def loss(net, batch):
        x, y = batch
        return F.cross_entropy(net(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1), y)

    dims = dict.fromkeys([name for name, _ in model.named_modules()], "folded")
    return Case(model, loss, (features(B, 2, 4), classes()), options={"batch_dims": dims})


@separate
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=B, n_embd=E, n_layer=1, n_head=2))
    tokens = torch.randint(0, 11, (B, B))
    return Case(model.train(), lambda net, d: net(**d).loss, {"input_ids": tokens, "labels": tokens.clone()})


@separate
def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=11, hidden_size=E, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    tokens = torch.randint(0, 11, (B, T))
    labels = torch.where(torch.rand(B, T) < 0.5, tokens, -100)
    mask = torch.arange(T)[None] < torch.tensor([5, 3, 4, 2, 5, 1])[:, None]
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": mask.long()}
    return Case(BertForMaskedLM(config).train(), lambda net, d: net(**d).loss, batch)
