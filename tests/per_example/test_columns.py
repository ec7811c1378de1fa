"""Squared norms of groups of parameters, and of gradients in the optimizer's units."""

import pytest
import torch
import torch.nn.functional as F
from helpers.per_example_reference import TOLERANCE, measure, mixed_loss, per_example_gradients, sq_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from lightning_wn.per_example import PerExampleNorms
from lightning_wn.per_example.rules import gradients
from lightning_wn.weight_norm import apply_weight_norm

DOUBLE = torch.float64
randomized = settings(derandomize=True, deadline=None, max_examples=30)


def adam_like(parameters):
    """A denominator for each parameter as Adam has it, spread over two orders of magnitude."""
    generator = torch.Generator().manual_seed(7)
    drawn = {id(p): torch.rand(p.shape, generator=generator).to(p) + 0.01 for p in parameters}
    return lambda p: drawn[id(p)]


def check_columns(model, run, batch_size, *, parameters=None, groups=None, denominator=None, tolerance=None):
    """Compare every column with brute force; each parameter alone is a group unless groups are given."""
    parameters = [p for p in (parameters or model.parameters()) if p.requires_grad]
    groups = [[p] for p in parameters] if groups is None else groups
    denominator = denominator or adam_like(parameters)
    measured, state = measure(model, parameters, run, batch_size, steps=2, groups=groups, denominator=denominator)
    torch.set_rng_state(state)
    gradients = per_example_gradients(parameters, run() / batch_size)
    by_parameter = {id(p): sq_norms([g]) for p, g in zip(parameters, gradients, strict=True)}
    divided = sq_norms([g / denominator(p).double() for p, g in zip(parameters, gradients, strict=True)])
    total = sq_norms(gradients)
    expected = [sum((by_parameter[id(p)] for p in g if id(p) in by_parameter), 0 * total) for g in groups]
    tolerance = tolerance or TOLERANCE[parameters[0].dtype]
    assert measured.shape == (batch_size, len(groups) + 2)
    columns = measured.double().unbind(1)
    torch.testing.assert_close(columns[0], total, rtol=tolerance, atol=1e-30)
    # a group is judged by the example's total: the key bias of attention has a gradient of exactly zero
    for column, wanted in zip(columns[1:-1], expected, strict=True):
        assert ((column - wanted).abs() <= tolerance * total).all()
    torch.testing.assert_close(columns[-1], divided, rtol=tolerance, atol=1e-30)
    return measured


def weight_normalized(layer, spelling):
    if spelling == "ours":
        apply_weight_norm(layer, modules=[type(layer)])
        # away from g = ‖v‖, where the factor is 1 everywhere
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.7)
    elif spelling != "plain":
        parametrizations.weight_norm(layer, dim={"torch": 0, "torch_dim1": 1, "torch_none": None}[spelling])
    return layer


def layer_and_input(kind, dtype):
    return {
        "linear": lambda: (nn.Linear(5, 4, dtype=dtype), torch.randn(3, 6, 5, dtype=dtype)),
        "long_linear": lambda: (nn.Linear(5, 4, dtype=dtype), torch.randn(3, 50, 5, dtype=dtype)),
        "conv": lambda: (nn.Conv2d(4, 6, 3, groups=2, dtype=dtype), torch.randn(3, 4, 6, 5, dtype=dtype)),
        "transposed": lambda: (
            nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, dtype=dtype),
            torch.randn(3, 4, 3, 3, dtype=dtype),
        ),
        "embedding": lambda: (nn.Embedding(5, 3, padding_idx=1, dtype=dtype), torch.randint(0, 5, (3, 7))),
        "layer_norm": lambda: (nn.LayerNorm(5, dtype=dtype), torch.randn(3, 6, 5, dtype=dtype)),
        "group_norm": lambda: (nn.GroupNorm(2, 4, dtype=dtype), torch.randn(3, 4, 5, dtype=dtype)),
        "gru": lambda: (nn.GRU(5, 4, batch_first=True, dtype=dtype), torch.randn(3, 6, 5, dtype=dtype)),
    }[kind]()


NORMALIZED = ["linear", "long_linear", "conv", "transposed", "embedding"]
CASES = [(kind, "plain") for kind in [*NORMALIZED, "layer_norm", "group_norm", "gru"]] + [
    (kind, spelling) for kind in NORMALIZED for spelling in ["ours", "torch", "torch_dim1", "torch_none"]
]


@pytest.mark.parametrize(("kind", "spelling"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_every_rule(kind, spelling, dtype):
    torch.manual_seed(0)
    layer, x = layer_and_input(kind, dtype)
    if kind == "embedding":
        nn.init.normal_(layer.weight)  # the padding row is zero, of which torch's weight norm makes NaN
    weight_normalized(layer, spelling)

    def run():
        output = layer(x)
        return mixed_loss(output[0] if isinstance(output, tuple) else output)

    check_columns(layer, run, 3)


@randomized
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 6),
    chunk=st.integers(1, 60),
    spelling=st.sampled_from(["plain", "ours"]),
)
def test_materialised_a_few_examples_at_a_time(batch, length, chunk, spelling):
    torch.manual_seed(0)
    layer = weight_normalized(nn.Linear(4, 3, dtype=DOUBLE), spelling)
    x = torch.randn(batch, length, 4, dtype=DOUBLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "_CHUNK", chunk)
        check_columns(layer, lambda: mixed_loss(layer(x)), batch)


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0, dtype=DOUBLE))

    def forward(self, x):
        return torch.tanh(x * self.temperature)


def test_a_parameter_that_is_one_number():
    torch.manual_seed(0)
    model = nn.Sequential(Temperature(), nn.Linear(4, 3, dtype=DOUBLE))
    x = torch.randn(3, 5, 4, dtype=DOUBLE)
    check_columns(model, lambda: mixed_loss(model(x)), 3)


class Tied(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.table = nn.Embedding(vocabulary, 4, dtype=DOUBLE)
        self.middle = nn.Linear(4, 4, dtype=DOUBLE)
        self.head = nn.Linear(4, vocabulary, bias=False, dtype=DOUBLE)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.middle(torch.tanh(self.middle(self.table(tokens))))))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("vocabulary", [7, 100])
def test_tied_parameters_and_a_module_called_twice(normalized, vocabulary):
    torch.manual_seed(0)
    model = Tied(vocabulary)
    if normalized:
        apply_weight_norm(model, modules=[nn.Embedding, nn.Linear])
    tokens = torch.randint(0, 7, (3, 5))
    check_columns(model, lambda: mixed_loss(model(tokens)), 3)


class WithClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4, dtype=DOUBLE))
        self.positions = nn.Embedding(8, 4, dtype=DOUBLE)
        self.head = nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(torch.tanh(x + self.positions(torch.arange(x.shape[1]))))


def test_parameters_that_all_examples_share():
    torch.manual_seed(0)
    model = WithClassToken()
    x = torch.randn(3, 5, 4, dtype=DOUBLE)
    check_columns(model, lambda: mixed_loss(model(x)), 3)


def test_groups_may_overlap_and_hold_what_is_not_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    first, norm, last = (list(m.parameters()) for m in model)
    x = torch.randn(3, 4, dtype=DOUBLE)
    groups = [first, [*first, *norm], [*norm, *last], last, []]
    measured = check_columns(model, lambda: mixed_loss(model(x)), 3, parameters=[*first, *norm], groups=groups)
    # nothing of the last layer is measured, and the last group is empty
    assert (measured[:, 4:6] == 0).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_part_of_a_weight_normalized_layer_counts_nowhere(frozen):
    torch.manual_seed(0)
    layer = weight_normalized(nn.Linear(4, 3, dtype=DOUBLE), "ours")
    list(layer.parameters())[1 + frozen].requires_grad_(False)
    x = torch.randn(3, 5, 4, dtype=DOUBLE)
    check_columns(layer, lambda: mixed_loss(layer(x)), 3)


def test_in_the_units_of_adam_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, labels = torch.randn(5, 6), torch.arange(5) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run():
        return F.cross_entropy(model(x), labels, reduction="none")

    for _ in range(3):
        optimizer.zero_grad()
        run().mean().backward()
        optimizer.step()

    def denominator(p):
        state = optimizer.state[p]
        return (state["exp_avg_sq"] / (1 - 0.999 ** state["step"].item())).sqrt() + 1e-8

    check_columns(model, run, 5, denominator=denominator)


def test_without_optimizer_state_the_last_column_alone_is_nan():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    x = torch.randn(3, 4)
    parameters = list(model.parameters())

    def denominator(p):
        return None if p is parameters[2] else torch.ones_like(p)

    measured, _ = measure(
        model, parameters, lambda: mixed_loss(model(x)), 3, groups=[parameters], denominator=denominator
    )
    assert measured.shape == (3, 3)
    assert torch.isfinite(measured[:, :2]).all()
    assert measured[:, 2].isnan().all()


def test_one_column_stays_a_vector():
    layer = nn.Linear(4, 3)
    x = torch.randn(3, 4)
    parameters = list(layer.parameters())
    plain, _ = measure(layer, parameters, lambda: mixed_loss(layer(x)), 3)
    grouped, _ = measure(layer, parameters, lambda: mixed_loss(layer(x)), 3, groups=[parameters[:1]])
    assert plain.shape == (3,)
    assert grouped.shape == (3, 2)
    assert torch.equal(grouped[:, 0], plain)


def test_nothing_measured_is_zero_in_every_column():
    layer = nn.Linear(4, 3)
    norms = PerExampleNorms(layer, [layer.weight], groups=[[layer.weight]], denominator=torch.ones_like)
    norms.attach()
    norms.before_forward(3)
    loss = torch.ones((), requires_grad=True) * 1.0
    norms.before_backward(loss)
    loss.backward()
    assert torch.equal(norms.after_backward(), torch.zeros(3, 3))


def test_parameters_of_several_types():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).double())
    x = torch.randn(3, 4)
    check_columns(model, lambda: mixed_loss(model[1](model[0](x).double())), 3, tolerance=TOLERANCE[torch.float32])
