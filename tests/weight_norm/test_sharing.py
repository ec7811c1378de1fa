"""Weights with several owners stay shared; layers that cannot be rewritten are refused in words."""

import pytest
import torch
from helpers.weight_norm_models import tied
from torch import nn

from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm


def test_a_shared_weight_stays_shared():
    torch.manual_seed(0)
    model, plain = tied(), tied()
    plain.load_state_dict(model.state_dict())
    assert apply_weight_norm(model, [nn.Embedding, nn.Linear]) == ["embed", "head"]
    assert len(list(model.parameters())) == 2
    assert torch.equal(model["embed"].weight, plain["embed"].weight)
    for net in (model, plain):
        net["head"](net["embed"](torch.arange(9))).square().sum().backward()
    g, v = model.parameters()
    direction = v / v.norm(dim=1, keepdim=True)
    # the gradients of both uses arrive: float32 rounding of sums over 4 entries
    torch.testing.assert_close(g.grad, (plain["embed"].weight.grad * direction).sum(1, keepdim=True).detach())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model["embed"].weight, model["head"].weight)
    trained = model["head"].weight.detach().clone()
    assert fold_weight_norm(model) == ["embed", "head"]
    assert model["embed"].weight is model["head"].weight
    assert torch.equal(model["head"].weight, trained)
    assert len(list(model.parameters())) == 1


class Alias(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.alias = self.layer.weight


class AliasInside(nn.Linear):
    """Owns its weight under a second name that ends alike."""

    def __init__(self):
        super().__init__(3, 3)
        self.same_weight = self.weight


class NoReset(nn.Linear):
    reset_parameters = property()

    def __init__(self, *args, device):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.empty(*args, device=device))


def untied_by_data():
    model = tied()
    model["head"].weight = nn.Parameter(model["embed"].weight.data)
    return model


def transposed_pair():
    model = nn.Sequential(nn.Conv1d(4, 6, 3, bias=False), nn.ConvTranspose1d(6, 4, 3, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("build", "arguments", "words"),
    [
        (
            tied,
            {},
            ["'embed.weight', 'head.weight' are one shared", "'embed.weight' would not be", "select all"],
        ),
        (tied, {"modules": "embed"}, ["'head.weight' would not be", "exclude all of them"]),
        (Alias, {}, ["'alias', 'layer.weight' are one shared", "'alias' would not be"]),
        (lambda: nn.Sequential(AliasInside()), {}, ["'0.same_weight' would not be"]),
        (transposed_pair, {}, ["'0.weight', '1.weight' are one shared", "different dimensions"]),
        (untied_by_data, {"modules": "*"}, ["'embed.weight' and 'head.weight' share memory"]),
        (lambda: nn.Sequential(nn.Embedding(3, 2, sparse=True)), {"modules": "0"}, ["`sparse=True`", "'0'"]),
        (lambda: nn.Sequential(nn.Embedding(3, 2, max_norm=1)), {"modules": "0"}, ["`max_norm=1`"]),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, ["has no shape yet", "run one batch"]),
        (lambda: nn.Sequential(NoReset(3, 3, device="meta")), {}, ["meta device", "materialize"]),
        (lambda: nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)), {}, ["complex64", "real floating"]),
    ],
)
def test_what_cannot_be_rewritten_is_refused_and_nothing_changes(build, arguments, words):
    model = build()
    model.add_module("last", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="exclude") as error:
        apply_weight_norm(model, **arguments)
    for word in words:
        assert word in str(error.value)
    assert not any(hasattr(m, "parametrizations") for m in model.modules())


def test_parts_of_one_buffer_that_do_not_overlap_are_no_shared_weights():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    flat = torch.randn(18)
    for i, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[9 * i : 9 * i + 9].view(3, 3))
    assert apply_weight_norm(model) == ["0", "1"]
