"""State dicts of weight-normalized layers: saved plain where asked, loaded from every spelling, copied and pickled."""

import copy
import io
import pickle

import pytest
import torch
from helpers.weight_norm_models import tied
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as old_weight_norm

from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.checkpoint.keys import weight_from
from lightning_wn.weight_norm.checkpoint.state_dict import save_as_weights

LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "square": lambda: nn.Linear(4, 4),
    "one unit": lambda: nn.Linear(5, 1),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose1d(6, 4, 3),
    "square transposed": lambda: nn.ConvTranspose1d(4, 4, 3),
    "transposed groups": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
    "transposed depthwise": lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
}


def normalize(layer, how):
    """Normalize in this spelling, and move g and v so that w is none of them."""
    if how == "ours":
        apply_weight_norm(layer)
    elif how != "plain":
        kind, dim = how
        {"torch": parametrizations.weight_norm, "legacy": old_weight_norm}[kind](layer, dim=dim)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.rand_like(p))
    if how != "plain" and how[0] == "legacy":
        layer._forward_pre_hooks[next(iter(layer._forward_pre_hooks))](layer, None)  # computes the weight
    return layer


SPELLINGS = ["plain", "ours", *[(kind, dim) for kind in ("torch", "legacy") for dim in (0, 1, None)]]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_spelling_loads_through_the_weight(kind, how):
    source = normalize(LAYERS[kind](), how)
    weight = source.weight.detach().clone()
    target = LAYERS[kind]()
    apply_weight_norm(target)
    assert target.load_state_dict(source.state_dict()).missing_keys == []
    # torch's kernels sum in another order than ours
    torch.testing.assert_close(target.weight, weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(target.bias, source.bias, rtol=0, atol=0)


def test_a_plain_weight_is_loaded_bit_for_bit_and_g_and_v_with_it():
    source, target = nn.Linear(30, 20), nn.Linear(30, 20)
    apply_weight_norm(target)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight)
    apply_weight_norm(source)
    source.bias.data.zero_()
    target.load_state_dict(source.state_dict())
    for ours, theirs in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_saved_as_weights_a_state_dict_is_that_of_the_plain_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ConvTranspose1d(3, 2, 2))
    plain = copy.deepcopy(model)
    apply_weight_norm(model)
    save_as_weights(model.modules(), True)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert not any(value.requires_grad for value in state.values())
    plain.load_state_dict(state)
    for ours, theirs in zip(model, plain, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    save_as_weights(model.modules(), False)
    assert "0.parametrizations.weight.original0" in model.state_dict()


def test_loading_what_a_model_has_leaves_the_length_of_v_alone():
    layer = nn.Linear(6, 4)
    apply_weight_norm(layer)
    save_as_weights([layer], True)
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(3)
    before = [p.clone() for p in layer.parameters()]
    layer.load_state_dict(layer.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))


def test_tied_weights_are_saved_once_and_stay_tied():
    model = tied()
    apply_weight_norm(model, [nn.Embedding, nn.Linear])
    save_as_weights(model.modules(), True)
    for _ in range(2):
        state = model.state_dict(prefix="model.")
        assert state["model.embed.weight"] is state["model.head.weight"]
        with torch.no_grad():
            model["head"].parametrizations.weight.original0.add_(1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin["head"].parametrizations.weight.original1.zero_()
    twin.load_state_dict(loaded)
    assert torch.equal(twin["embed"].weight, model["head"].weight)
    assert len(list(twin.parameters())) == 2


def test_layers_that_only_look_alike_are_saved_apart():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    apply_weight_norm(model)
    save_as_weights(model.modules(), True)
    state = model.state_dict()
    assert state["0.weight"] is not state["1.weight"]
    assert state["0.weight"].data_ptr() != state["1.weight"].data_ptr()


def test_a_state_dict_with_graph_keeps_it():
    layer = nn.Linear(3, 2)
    apply_weight_norm(layer)
    save_as_weights([layer], True)
    layer.state_dict(keep_vars=True)["weight"].sum().backward()
    assert layer.parametrizations.weight.original0.grad.abs().sum() > 0


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_missing_or_misshapen_is_named_as_in_the_plain_model(strict):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    plain = copy.deepcopy(model)
    apply_weight_norm(model)
    state = plain.state_dict()
    del state["1.weight"]
    if strict:
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1.weight"'):
            model.load_state_dict(state)
    else:
        assert model.load_state_dict(state, strict=False).missing_keys == ["1.weight"]
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"0\.weight cannot be .* checkpoint's has the shape \(5, 4\), .*\(3, 4\)"):
        model.load_state_dict(plain.state_dict() | {"0.weight": torch.zeros(5, 4)}, strict=strict)
    with pytest.raises(RuntimeError, match=r"0\.weight cannot be weight-normalized: .*NaN"):
        model.load_state_dict(plain.state_dict() | {"0.weight": torch.full((3, 4), torch.nan)}, strict=strict)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("g", "v"), [((3, 1), (4, 5)), ((2, 2), (2, 2)), ((3,), (3, 4)), ((1, 5, 1), (4, 2, 3)), ((1, 6, 1), (4, 2, 3))]
)
def test_shapes_that_do_not_fit_each_other_are_refused(g, v):
    with pytest.raises(ValueError, match="are no weight normalization of one weight"):
        weight_from(torch.ones(g), torch.ones(v))


@pytest.mark.parametrize("through", ["copy", "pickle", "torch"])
def test_an_unfolded_model_is_copied_and_pickled(through):
    torch.manual_seed(0)
    model = nn.ModuleDict({"tied": tied(), "up": nn.ConvTranspose1d(4, 4, 2, groups=2).eval()})
    apply_weight_norm(model, "*")
    save_as_weights(model["tied"].modules(), True)
    if through == "copy":
        twin = copy.deepcopy(model)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert list(twin.state_dict()) == list(model.state_dict())
    for (name, p), (other, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other
        assert p is not q
        assert torch.equal(p, q)
    assert not twin["up"].training
    x = torch.randn(1, 4, 5)
    assert torch.equal(twin["up"](x), model["up"](x))
    twin["up"](x).sum().backward()
    again = pickle.loads(pickle.dumps(twin))
    assert fold_weight_norm(twin) == ["tied.embed", "tied.head", "up"]
    assert twin["tied"]["embed"].weight is twin["tied"]["head"].weight
    assert type(twin["up"]) is nn.ConvTranspose1d
    assert torch.equal(again["up"].weight, model["up"].weight)
    assert torch.equal(model["up"].weight, twin["up"].weight)


def test_other_parametrizations_cannot_be_pickled_still():
    class Twice(nn.Module):
        def forward(self, bias):
            return 2 * bias

    layer = nn.Linear(3, 3)
    apply_weight_norm(layer)
    parametrize.register_parametrization(layer, "bias", Twice())
    with pytest.raises(RuntimeError, match="other parametrizations than weight normalization, of bias"):
        pickle.dumps(layer)
    fold_weight_norm(layer)
    with pytest.raises(RuntimeError, match="other parametrizations"):
        pickle.dumps(layer)


def test_a_folded_layer_keeps_no_hooks():
    layer = nn.Linear(3, 3)
    apply_weight_norm(layer)
    fold_weight_norm(layer)
    assert not layer._state_dict_hooks
    assert not layer._load_state_dict_pre_hooks
    assert not layer._load_state_dict_post_hooks


def test_torchs_own_removal_leaves_a_plain_layer():
    layer = nn.Linear(3, 3)
    apply_weight_norm(layer)
    save_as_weights([layer], True)
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    layer.load_state_dict(nn.Linear(3, 3).state_dict() | {"weight": weight})
    assert torch.equal(layer.weight, weight)


def test_layers_that_share_g_alone_are_saved_apart():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    apply_weight_norm(model)
    save_as_weights(model.modules(), True)
    model[1].parametrizations.weight.original0 = model[0].parametrizations.weight.original0
    state = model.state_dict()
    for i in range(2):
        assert torch.equal(state[f"{i}.weight"], model[i].weight)
