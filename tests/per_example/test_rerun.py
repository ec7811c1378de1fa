"""Modules without a rule, and parameters that are used more than once."""

import pytest
import torch
import torch.nn.functional as F
from helpers.per_example_reference import Scaled, check, mixed_loss
from torch import nn
from torch.nn.utils import parametrizations

from lightning_wn.per_example import PerExampleError, measure_as_one
from lightning_wn.weight_norm import apply_weight_norm

DOUBLE = torch.float64


def double(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "dropout": 0.5}, {"bidirectional": True}])
def test_recurrent(kind, batch_first, options):
    torch.manual_seed(0)
    model = kind(3, 4, batch_first=batch_first, dtype=DOUBLE, **options)
    # as many steps as examples: nothing can be told from the shape
    x = double(5, 5, 3)

    def run():
        output = model(x)[0]
        return mixed_loss(output if batch_first else output.transpose(0, 1))

    check(model, run, 5)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_biases_of_a_recurrent_module_alone(kind):
    torch.manual_seed(0)
    model = kind(3, 4, batch_first=True, dtype=DOUBLE)
    x = double(5, 5, 3)
    biases = [model.bias_ih_l0, model.bias_hh_l0]
    check(model, lambda: mixed_loss(model(x)[0]), 5, parameters=biases)


def test_the_bias_of_attention_alone():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True, dtype=DOUBLE)
    x = double(4, 4, 4)
    check(model, lambda: mixed_loss(model(x, x, x)[0]), 4, parameters=[model.in_proj_bias])


def test_recurrent_with_states_and_final_state():
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, batch_first=True, dtype=DOUBLE)
    x, states = double(5, 6, 3), (double(1, 5, 4), double(1, 5, 4))

    def run():
        output, (hidden, _) = model(x, states)
        return mixed_loss(output[:, -1]) + mixed_loss(hidden[0])

    check(model, run, 5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_multihead_attention(batch_first, dropout, mask):
    torch.manual_seed(0)
    model = Scaled(nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=batch_first, dtype=DOUBLE))
    length = 6
    x = double(3, length, 4) if batch_first else double(length, 3, 4)
    masks = {"need_weights": False}
    if mask == "causal":
        masks["attn_mask"] = torch.ones(length, length, dtype=torch.bool).triu(1)
    elif mask == "padding":
        masks["key_padding_mask"] = torch.arange(length) >= torch.tensor([[6], [4], [3]])

    def run():
        y = x * 1.0
        output = model.inner(y, y, y, **masks)[0]
        return mixed_loss(output if batch_first else output.transpose(0, 1))

    check(model, run, 3)


def test_a_square_attention_mask_of_batch_size_is_no_batch():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True, dtype=DOUBLE)
    x = double(4, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    check(model, lambda: mixed_loss(model(x, x, x, attn_mask=mask)[0]), 4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer(dropout, norm_first):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, norm_first=norm_first, dtype=DOUBLE)
    x = double(3, 5, 8)
    check(model, lambda: mixed_loss(model(x)), 3)


class Gate(nn.Module):
    def __init__(self, inplace=False, dropout=0.0):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 4, dtype=DOUBLE))
        self.shift = nn.Parameter(torch.randn(4, dtype=DOUBLE))
        self.dropout = dropout
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *, scale=1.0):
        self.calls += 1
        hidden = F.dropout(torch.tanh(x @ self.gate + self.shift), self.dropout)
        return {"out": hidden * scale * x.sum(-1, keepdim=True), "name": "gate"}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_bare_parameters_keywords_and_dictionaries(dropout):
    torch.manual_seed(0)
    model = Gate(dropout=dropout)
    x = double(3, 5, 4)
    check(model, lambda: mixed_loss(model(x, scale=2.0)["out"]), 3)
    # two measured steps and the brute force one; running the module again leaves its buffers alone
    assert model.calls == 3


def test_unknown_parametrization():
    torch.manual_seed(0)
    layer = parametrizations.orthogonal(nn.Linear(4, 4, dtype=DOUBLE))
    x = double(3, 5, 4)
    check(layer, lambda: mixed_loss(layer(x)), 3)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * self.weight.sum()


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_base():
    torch.manual_seed(0)
    layer = ScaledLinear(4, 3, dtype=DOUBLE)
    x = double(3, 5, 4)
    check(layer, lambda: mixed_loss(layer(x)), 3)


class Mixing(nn.Module):
    """Subtracts the mean of the batch, between a parameter and the output."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, dtype=DOUBLE))
        self.dropout = dropout

    def forward(self, x):
        x = F.dropout(torch.tanh(x * self.gate), self.dropout)
        return x - x.mean(0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_module_that_mixes_examples_is_refused(dropout):
    model, x = Mixing(dropout), double(3, 4)
    with pytest.raises(PerExampleError, match="mixes examples"):
        check(model, lambda: mixed_loss(model(x)), 3)


class Tied(nn.Module):
    def __init__(self, weight_norm=False, vocabulary=7):
        super().__init__()
        self.table = nn.Embedding(vocabulary, 4, dtype=DOUBLE)
        self.middle = nn.Linear(4, 4, dtype=DOUBLE)
        self.head = nn.Linear(4, vocabulary, bias=False, dtype=DOUBLE)
        self.head.weight = self.table.weight
        if weight_norm:
            apply_weight_norm(self, modules=[nn.Embedding, nn.Linear])

    def forward(self, tokens):
        return self.head(torch.tanh(self.middle(self.table(tokens))))


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("vocabulary", [7, 100])  # materialised, and by the product of both factors
def test_tied_embedding(weight_norm, vocabulary):
    torch.manual_seed(0)
    model = Tied(weight_norm, vocabulary)
    tokens = torch.randint(0, 7, (3, 3))
    check(model, lambda: mixed_loss(model(tokens)), 3)


@pytest.mark.parametrize("spelling", ["plain", "ours", "torch"])
@pytest.mark.parametrize("length", [1, 20])
def test_a_module_called_twice(spelling, length):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=DOUBLE)
    if spelling == "ours":
        apply_weight_norm(layer)
    elif spelling == "torch":
        parametrizations.weight_norm(layer)
    x = double(3, length, 4)
    check(layer, lambda: mixed_loss(layer(torch.tanh(layer(x)))), 3)


def test_a_convolution_called_twice_and_an_embedding_called_twice():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, padding=1, dtype=DOUBLE)
    x = double(3, 2, 5, 5)
    check(layer, lambda: mixed_loss(layer(torch.tanh(layer(x)))), 3)
    table = nn.Embedding(5, 3, dtype=DOUBLE)
    a, b = torch.randint(0, 5, (3, 4)), torch.randint(0, 5, (3, 2))
    check(table, lambda: mixed_loss(table(a)) + mixed_loss(table(b)).square(), 3)


def test_a_result_that_the_loss_does_not_use():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=DOUBLE)
    x = double(3, 4)

    def run():
        layer(x * 2)
        return mixed_loss(layer(x))

    check(layer, run, 3)


class PastForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4, dtype=DOUBLE)

    def forward(self, tokens):
        return F.linear(torch.tanh(self.table(tokens)), self.table.weight)


def test_a_parameter_used_past_its_module_is_refused_unless_measured_as_one():
    torch.manual_seed(0)
    model = PastForward()
    tokens = torch.randint(0, 7, (3, 5))
    with pytest.raises(PerExampleError, match=r"'table\.weight'.*measure_as_one"):
        check(model, lambda: mixed_loss(model(tokens)), 3)
    measure_as_one(PastForward)
    check(model, lambda: mixed_loss(model(tokens)), 3)


class Positions(nn.Module):
    """A class token and positions, given in several spellings."""

    def __init__(self, spelling, size=6):
        super().__init__()
        self.spelling = spelling
        self.size = size
        self.token = nn.Parameter(torch.randn(1, 1, 4, dtype=DOUBLE))
        self.bare = nn.Parameter(torch.randn(1, 16, 4, dtype=DOUBLE))
        self.table = nn.Embedding(16, 4, dtype=DOUBLE)
        self.mix = nn.Linear(4, 4, dtype=DOUBLE)

    def forward(self, x):
        batch, length, _ = x.shape
        if self.spelling == "expand":
            x = torch.cat([self.token.expand(batch, -1, -1), x], 1) + self.bare[:, : length + 1]
        elif self.spelling == "repeat":
            x = torch.cat([self.token.repeat(batch, 1, 1), x], 1) - self.bare[:, : length + 1]
        elif self.spelling == "table":
            x = x + self.table(torch.arange(length)) + torch.add(x, self.table(torch.arange(length)[None]), alpha=2)
        elif self.spelling == "unsqueezed":
            x = x + self.table(torch.arange(length))[None]
        elif self.spelling == "scaled":
            x = x * self.table(torch.arange(length))
        elif self.spelling == "squeezed":
            x = x + self.bare.squeeze(0)[:length] + (self.token + self.bare)[:, :length]
        elif self.spelling == "multiplied":
            x = x * self.bare[:, :length]
        return torch.tanh(self.mix(x))


@pytest.mark.parametrize("spelling", ["expand", "repeat", "table", "unsqueezed", "squeezed", "multiplied"])
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_parameters_without_a_batch_dimension(spelling, batch):
    torch.manual_seed(0)
    model = Positions(spelling)
    x = double(batch, 6, 4)  # six positions: as many as examples, once
    check(model, lambda: mixed_loss(model(x)), batch)


@pytest.mark.parametrize("batch", [3, 6])
def test_a_shared_table_that_multiplies_the_batch(batch):
    model = Positions("scaled")
    x = double(batch, 6, 4)
    check(model, lambda: mixed_loss(model(x)), batch)
