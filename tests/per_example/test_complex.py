"""Complex parameters: |z|², not z², in every form; and parameters that a parent and its child hold."""

import pytest
import torch
from helpers.per_example_reference import check as check_real
from helpers.per_example_reference import measure, mixed_loss
from torch import nn

C = torch.complex128


class Spectral(nn.Module):
    """Has no rule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, dtype=C))

    def forward(self, x):
        return torch.einsum("...m,om->...o", x, self.weight)


class Gate(nn.Module):
    """Meets the batch by a sum."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4, dtype=C))

    def forward(self, x):
        return x + self.shift


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3, dtype=C), (5, 4)),
    "long_linear": (lambda: nn.Linear(4, 3, dtype=C), (5, 40, 4)),
    "positions": (lambda: nn.Linear(40, 30, dtype=C), (5, 3, 40)),
    "conv": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2, dtype=C), (5, 4, 7)),
    "no_rule": (Spectral, (5, 6, 4)),
    "shift": (Gate, (5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_squares_of_both_parts(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(shape, dtype=C)
    parameters = list(layer.parameters())

    def losses():
        y = layer(x)
        return mixed_loss(y.real) + mixed_loss(y.imag * 1.5)

    measured, _ = measure(layer, parameters, losses, 5, steps=2)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses() / 5]
    expected = torch.stack([sum(g.abs().square().sum() for g in row) for row in rows])
    # sums of a few hundred products in float64
    torch.testing.assert_close(measured.double(), expected, rtol=1e-10, atol=0)


class Head(nn.Module):
    """Holds its child's bias, as BERT's head does."""

    def __init__(self, *, uses):
        super().__init__()
        self.decoder = nn.Linear(4, 3)
        self.bias = self.decoder.bias
        self.uses = uses

    def forward(self, x):
        y = self.decoder(x.relu())
        return y.sin() + self.bias if self.uses else y


@pytest.mark.parametrize("uses", [False, True])
def test_a_bias_that_a_parent_and_its_child_hold(uses):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Head(uses=uses)).double()
    x = torch.randn(5, 7, 6).double()
    check_real(model, lambda: mixed_loss(model(x)), 5)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_one_step_of_a_recurrent_cell(cell):
    torch.manual_seed(0)
    model, x = cell(4, 3).double(), torch.randn(5, 4).double()
    check_real(model, lambda: mixed_loss(out[0] if isinstance(out := model(x), tuple) else out), 5)
