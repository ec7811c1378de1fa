"""Rewriting and folding whole modules in place."""

import copy

import pytest
import torch
from helpers.weight_norm_models import tied
from torch import nn
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm

LAYERS = {
    "linear": lambda: nn.Linear(33, 17),
    "wide linear": lambda: nn.Linear(20_000, 1),
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "conv2d groups": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False),
    "conv3d": lambda: nn.Conv3d(3, 5, 2),
    "transposed1d": lambda: nn.ConvTranspose1d(6, 8, 3),
    "transposed2d groups": lambda: nn.ConvTranspose2d(6, 8, 3, groups=2),
    "transposed3d depthwise": lambda: nn.ConvTranspose3d(4, 4, 2, groups=4),
    "embedding": lambda: nn.Embedding(11, 7, padding_idx=0),
}
SHAPES = {
    "linear": (17, 1),
    "conv2d groups": (8, 1, 1, 1),
    "transposed1d": (1, 8, 1),
    "transposed2d groups": (1, 8, 1, 1),
    "embedding": (11, 1),
}


def snapshot(model):
    return {name: (p, p.detach().clone()) for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    assert list(dict(model.named_parameters())) == list(before)
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("zero_unit", [False, True])
def test_weights_are_bit_equal_through_rewriting_training_and_folding(kind, dtype, zero_unit):
    layer = LAYERS[kind]().to(dtype)
    if zero_unit and min(layer.weight.shape[:2]) > 1:
        with torch.no_grad():
            layer.weight[1] = 0
            layer.weight[:, 1] = 0
    names = [name for name, _ in layer.named_parameters()]
    before = layer.weight.detach().clone()
    assert apply_weight_norm(layer, type(layer)) == [""]
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, before)
    if kind in SHAPES:
        assert tuple(layer.parametrizations.weight.original0.shape) == SHAPES[kind]
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    trained = layer.weight.detach().clone()
    assert not torch.equal(trained, before)
    assert fold_weight_norm(layer) == [""]
    assert torch.equal(layer.weight, trained)
    assert type(layer.weight) is nn.Parameter
    assert type(layer) is type(LAYERS[kind]())
    assert [name for name, _ in layer.named_parameters()] == names
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    assert fold_weight_norm(layer) == []


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_bit_equal(kind):
    layer = LAYERS[kind]()
    if isinstance(layer, nn.Embedding):
        x = torch.arange(11)
    elif isinstance(layer, nn.Linear):
        x = torch.randn(5, layer.in_features)
    else:
        x = torch.randn(2, layer.in_channels, *[5] * len(layer.kernel_size))
    before = layer(x)
    apply_weight_norm(layer, type(layer))
    assert torch.equal(layer(x), before)
    fold_weight_norm(layer)
    assert torch.equal(layer(x), before)


def test_training_flag_frozen_weights_and_their_kind_are_kept():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    model[0].weight.requires_grad_(False)
    apply_weight_norm(model)
    assert [p.requires_grad for p in model[0].parametrizations.weight.parameters()] == [False, False]
    assert [p.requires_grad for p in model[1].parametrizations.weight.parameters()] == [True, True]
    assert not any(m.training for m in model.modules())
    fold_weight_norm(model)
    assert isinstance(model[0].weight, nn.Parameter)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert not any(m.training for m in model.modules())


def test_a_model_half_frozen_afterwards_folds_to_a_trainable_weight():
    layer = nn.Linear(3, 3)
    apply_weight_norm(layer)
    layer.parametrizations.weight.original1.requires_grad_(False)
    fold_weight_norm(layer)
    assert layer.weight.requires_grad


def test_memory_format_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)).to(
        memory_format=torch.channels_last
    )
    strides = [m.weight.stride() for m in model]
    apply_weight_norm(model)
    assert [m.weight.stride() for m in model] == strides
    fold_weight_norm(model)
    assert [m.weight.stride() for m in model] == strides


def test_rewriting_keeps_no_second_copy_alive():
    layer = nn.Linear(3, 3)
    apply_weight_norm(layer)
    assert layer.parametrizations.weight[0].replaced() is None


def test_training_equals_torchs_weight_norm():
    """Same loss at every step, in float64, to rounding: only the order of operations differs."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    theirs = copy.deepcopy(ours)
    apply_weight_norm(ours)
    for layer in (theirs[0], theirs[2]):
        parametrizations.weight_norm(layer)
    x = torch.randn(64, 6, dtype=torch.float64)
    y = x.sin().sum(1, keepdim=True)
    curves = []
    for model in (ours, theirs):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        curves.append([])
        for _ in range(200):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0][-1] < 0.1 * curves[0][0]
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-8, atol=1e-12)


def test_a_padding_row_stays_zero():
    layer = nn.Embedding(5, 4, padding_idx=2)
    apply_weight_norm(layer, nn.Embedding)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(torch.arange(5)) - 1).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight[2], torch.zeros(4))
    assert layer.weight[1].abs().sum() > 0
    fold_weight_norm(layer)
    assert layer.padding_idx == 2
    assert torch.equal(layer.weight[2], torch.zeros(4))


def test_applying_twice_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert apply_weight_norm(model, exclude="1") == ["0"]
    before = snapshot(model[0])
    assert apply_weight_norm(model) == ["1"]
    assert_unchanged(model[0], before)
    both = snapshot(model)
    assert apply_weight_norm(model) == []
    assert_unchanged(model, both)


@pytest.mark.parametrize(
    "by",
    [
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
        old_spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_is_left_alone(by):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    by(model[0])
    before = snapshot(model[0])
    assert apply_weight_norm(model) == ["1"]
    assert_unchanged(model[0], before)
    assert fold_weight_norm(model) == ["1"]
    assert_unchanged(model[0], before)


@pytest.mark.parametrize("by", [parametrizations.weight_norm, old_weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchs_weight_norm_is_left_alone_until_folded(by):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    by(model[0])
    before = snapshot(model[0])
    assert apply_weight_norm(model) == ["1"]
    assert_unchanged(model[0], before)
    assert fold_weight_norm(model) == ["0", "1"]


def test_a_parametrized_bias_is_kept_on_both_ways():
    class Twice(nn.Module):
        def forward(self, bias):
            return 2 * bias

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "bias", Twice())
    other = copy.deepcopy(layer)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert apply_weight_norm(layer) == [""]
    assert torch.equal(other.weight, weight)  # a deep copy shares the parametrized class
    assert type(other.weight) is nn.Parameter
    assert torch.equal(layer.weight, weight)
    twin = copy.deepcopy(layer)
    assert fold_weight_norm(layer) == [""]
    assert torch.equal(twin.weight, weight)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)
    assert parametrize.is_parametrized(layer, "bias")
    assert not parametrize.is_parametrized(layer, "weight")
    assert type(layer.weight) is nn.Parameter


def test_another_parametrization_on_top_cannot_be_folded_from_under_it():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    apply_weight_norm(model)
    parametrize.register_parametrization(model[1], "weight", Twice())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'1' \(Linear\) has another parametrization on top .*remove"):
        fold_weight_norm(model)
    assert_unchanged(model, before)


def test_deep_copies_are_independent():
    model = tied()
    apply_weight_norm(model, [nn.Linear, nn.Embedding])
    weight = model["head"].weight.detach().clone()
    twin = copy.deepcopy(model)
    lists = [twin[key].parametrizations.weight for key in ("embed", "head")]
    assert lists[0].original0 is lists[1].original0
    assert lists[0].original1 is lists[1].original1
    assert lists[0].original0 is not model["embed"].parametrizations.weight.original0
    assert fold_weight_norm(twin) == ["embed", "head"]
    assert twin["embed"].weight is twin["head"].weight
    # torch's remove_parametrizations would have taken the weight away from the first model here
    assert torch.equal(model["head"].weight, weight)
    assert fold_weight_norm(model) == ["embed", "head"]
    assert torch.equal(model["head"].weight, weight)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_on_the_weight_are_not_lost_in_silence(hook):
    layer = nn.Linear(3, 3)
    getattr(layer.weight, hook)(lambda grad: None)
    with pytest.raises(ValueError, match=r"gradient hooks.*after the rewriting"):
        apply_weight_norm(layer)


def test_a_bad_value_in_a_late_layer_leaves_earlier_layers_plain():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'1' \(Linear\) cannot be weight-normalized: .*NaN"):
        apply_weight_norm(model)
    assert_unchanged(model, before)


def test_a_failure_while_rewriting_is_undone(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    before = snapshot(model)
    register = parametrize.register_parametrization

    def fails_at_the_last(module, *args):
        if module is model[2]:
            raise MemoryError
        return register(module, *args)

    monkeypatch.setattr(parametrize, "register_parametrization", fails_at_the_last)
    with pytest.raises(MemoryError):
        apply_weight_norm(model)
    assert_unchanged(model, before)
    assert {type(m) for m in model} == {nn.Linear}


def test_a_sharded_weight_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        layer = nn.Linear(4, 4)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
        with pytest.raises(ValueError, match=r"its weight is a DTensor.*before `fully_shard`"):
            apply_weight_norm(layer)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model_computes_the_same():
    model = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (8, 1)), nn.ConvTranspose1d(8, 4, 2, groups=2))
    x = torch.randn(3, 4)
    apply_weight_norm(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_state_dicts_move_between_models():
    first, second = (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)) for _ in range(2))
    for model in (first, second):
        apply_weight_norm(model)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first[0].weight, second[0].weight)
