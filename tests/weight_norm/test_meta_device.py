"""Layers on the meta device are normalized there and get g and v when they are materialized."""

import copy

import pytest
import torch
from lightning.fabric.utilities.init import _materialize_distributed_module
from torch import nn

from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm

LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "no bias": lambda: nn.Linear(5, 4, bias=False),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "embedding": lambda: nn.Embedding(7, 3, padding_idx=1),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_materialized_weights_are_initialized_as_plain_ones(kind, copied):
    with torch.device("meta"):
        model = nn.Sequential(LAYERS[kind]())
    assert apply_weight_norm(model, "*") == ["0"]
    assert all(p.is_meta for p in model.parameters())
    if copied:
        model = copy.deepcopy(model)
    torch.manual_seed(0)
    _materialize_distributed_module(model, torch.device("cpu"))
    torch.manual_seed(0)
    plain = LAYERS[kind]()
    assert torch.equal(model[0].weight, plain.weight)
    g, v = model[0].parametrizations.weight.original0, model[0].parametrizations.weight.original1
    assert torch.equal(compose_norm(v, g), g.abs().masked_fill(g == 0, 1.0))
    assert fold_weight_norm(model) == ["0"]
    assert [name for name, _ in model[0].named_parameters()] == [name for name, _ in plain.named_parameters()]


def compose_norm(v, g):
    dims = [d for d in range(v.ndim) if g.shape[d] == 1]
    if g.shape[1:2] == (6,):  # two groups of inputs, three outputs each
        return v.view(2, 2, 3, -1).permute(0, 2, 1, 3).flatten(2).norm(dim=2).view(1, 6, 1)
    norm = v.norm(dim=dims, keepdim=True)
    return torch.where((norm - g).abs() < 1e-6, g, norm).masked_fill(g == 0, 1.0)


def test_resetting_a_layer_resets_g_and_v():
    layer = nn.Linear(4, 3)
    apply_weight_norm(layer)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(5)
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    v = layer.parametrizations.weight.original1
    assert torch.equal(layer.weight, v)  # v is the weight again
    layer.weight.sum().backward()
    assert v.grad is not None


def test_a_plain_checkpoint_gives_meta_layers_their_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    apply_weight_norm(model)
    plain = nn.Sequential(nn.Linear(4, 3))
    model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model[0].weight, plain[0].weight)


SEVERAL = {
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "gru without bias": lambda: nn.GRU(3, 4, bias=False),
    "lstm cell": lambda: nn.LSTMCell(3, 4),
    "rnn cell without bias": lambda: nn.RNNCell(3, 4, bias=False),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dim", ["output", None])
@pytest.mark.parametrize("kind", SEVERAL)
def test_layers_with_several_weights_are_initialized_as_plain_ones(kind, dim):
    with torch.device("meta"):
        model = nn.Sequential(SEVERAL[kind]())
    assert apply_weight_norm(model, "*", dim=dim) == ["0"]
    torch.manual_seed(0)
    _materialize_distributed_module(model, torch.device("cpu"))
    torch.manual_seed(0)
    plain = nn.Sequential(SEVERAL[kind]())
    twin = copy.deepcopy(model)
    fold_weight_norm(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # and again
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(3)
    names, children = list(dict(twin.named_parameters())), list(twin[0]._modules)
    torch.manual_seed(0)
    twin[0].reset_parameters()
    assert (list(dict(twin.named_parameters())), list(twin[0]._modules)) == (names, children)
    fold_weight_norm(twin)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name


def test_attention_which_cannot_initialize_itself_is_refused():
    with torch.device("meta"):
        model = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match="no `reset_parameters`"):
        apply_weight_norm(model, "")


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_plain_file_is_assigned_to_meta_layers(kind):
    plain = SEVERAL[kind]()
    with torch.device("meta"):
        model = SEVERAL[kind]()
    apply_weight_norm(model, "")
    model.load_state_dict(plain.state_dict(), assign=True)
    fold_weight_norm(model)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
