"""Every rule against brute force, over randomized shapes and options."""

import pytest
import torch
from helpers.per_example_reference import check, mixed_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from lightning_wn.per_example import PerExampleError, PerExampleNorms
from lightning_wn.weight_norm import apply_weight_norm

randomized = settings(derandomize=True, deadline=None, max_examples=30)
dtypes = st.sampled_from([torch.float32, torch.float64])
spellings = st.sampled_from(["plain", "ours", "torch", "torch_dim1", "torch_none", "legacy"])
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def scattered(x):
    """The same numbers, not contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def weight_normalize(layer, spelling):
    if spelling == "ours":
        apply_weight_norm(layer, modules=[type(layer)])
        # away from g = ‖v‖, where the factor is 1 everywhere
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.7)
    elif spelling == "legacy":
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(layer)
    elif spelling.startswith("torch"):
        dim = {"torch": 0, "torch_dim1": 1, "torch_none": None}[spelling]
        parametrizations.weight_norm(layer, dim=dim)
    return layer


@randomized
@given(
    batch=st.integers(1, 4),
    leading=st.lists(st.integers(1, 5), max_size=3),
    features=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    bias=st.booleans(),
    dtype=dtypes,
    spelling=spellings,
    contiguous=st.booleans(),
)
def test_linear(batch, leading, features, bias, dtype, spelling, contiguous):
    torch.manual_seed(0)
    layer = weight_normalize(nn.Linear(*features, bias=bias, dtype=dtype), spelling)
    x = torch.randn(batch, *leading, features[0], dtype=dtype)
    x = x if contiguous else scattered(x)
    check(layer, lambda: mixed_loss(layer(x)), batch)


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("spelling", ["plain", "ours"])
def test_linear_takes_the_cheaper_of_two_exact_forms(length, spelling):
    layer = weight_normalize(nn.Linear(30, 20, dtype=torch.float64), spelling)
    x = torch.randn(3, length, 30, dtype=torch.float64)
    check(layer, lambda: mixed_loss(layer(x)), 3)


@randomized
@given(
    data=st.data(),
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    dtype=dtypes,
    spelling=spellings,
    contiguous=st.booleans(),
)
def test_convolution(data, dims, groups, per_group, bias, mode, dtype, spelling, contiguous):
    torch.manual_seed(0)

    def sizes(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    padding = data.draw(st.sampled_from(["same", "valid", "numbers"]))
    padding = sizes(0, 2) if padding == "numbers" else padding
    layer = CONVS[dims](
        groups * per_group[0], groups * per_group[1], sizes(1, 3), padding=padding, dilation=sizes(1, 2),
        stride=1 if padding == "same" else sizes(1, 3), groups=groups, bias=bias, padding_mode=mode, dtype=dtype,
    )  # fmt: skip
    weight_normalize(layer, spelling)
    x = torch.randn(2, layer.in_channels, *sizes(5, 7), dtype=dtype)
    x = x if contiguous else scattered(x)
    check(layer, lambda: mixed_loss(layer(x)), 2)


@randomized
@given(
    data=st.data(),
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    dtype=dtypes,
    spelling=spellings,
)
def test_transposed_convolution(data, dims, groups, per_group, bias, dtype, spelling):
    torch.manual_seed(0)

    def sizes(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    stride, dilation = sizes(1, 3), sizes(1, 2)
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    layer = TRANSPOSED[dims](
        groups * per_group[0], groups * per_group[1], sizes(1, 3), padding=sizes(0, 1), dilation=dilation,
        stride=stride, output_padding=extra, groups=groups, bias=bias, dtype=dtype,
    )  # fmt: skip
    weight_normalize(layer, spelling)
    x = scattered(torch.randn(2, layer.in_channels, *sizes(3, 5), dtype=dtype))
    check(layer, lambda: mixed_loss(layer(x)), 2)


@randomized
@given(
    batch=st.integers(1, 4),
    leading=st.lists(st.integers(1, 6), max_size=2),
    padding_idx=st.sampled_from([None, 0, 2]),
    dtype=dtypes,
    spelling=st.sampled_from(["plain", "ours", "torch", "torch_dim1"]),
)
def test_embedding(batch, leading, padding_idx, dtype, spelling):
    torch.manual_seed(0)
    # few tokens, so that many repeat
    layer = nn.Embedding(4, 3, padding_idx=padding_idx, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_()
    weight_normalize(layer, spelling)
    tokens = scattered(torch.randint(0, 4, (batch, *leading)))
    check(layer, lambda: mixed_loss(layer(tokens)), batch)


def test_embedding_with_sparse_gradients():
    layer = nn.Embedding(5, 3, sparse=True)
    tokens = torch.tensor([[1, 1, 4], [0, 2, 1]])
    dense = nn.Embedding(5, 3, _weight=layer.weight.detach().clone())
    expected = check(dense, lambda: mixed_loss(dense(tokens)), 2)
    norms = PerExampleNorms(layer, [layer.weight])
    norms.attach()
    norms.before_forward(2)
    loss = mixed_loss(layer(tokens)).mean()
    norms.before_backward(loss)
    loss.backward()
    torch.testing.assert_close(norms.after_backward(), expected)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_embedding_options_without_per_example_gradients_are_refused(options):
    layer = nn.Embedding(5, 3, **options)
    with pytest.raises(PerExampleError, match=next(iter(options))):
        check(layer, lambda: mixed_loss(layer(torch.tensor([[1, 1], [0, 2]]))), 2)


@randomized
@given(
    batch=st.integers(1, 3),
    leading=st.lists(st.integers(1, 4), max_size=2),
    normalized=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    kind=st.sampled_from(["layer", "layer_no_bias", "rms", "rms_eps"]),
    dtype=dtypes,
    contiguous=st.booleans(),
)
def test_layer_and_rms_norm(batch, leading, normalized, kind, dtype, contiguous):
    torch.manual_seed(0)
    if kind.startswith("layer"):
        layer = nn.LayerNorm(normalized, bias=kind == "layer", dtype=dtype)
    else:
        layer = nn.RMSNorm(normalized, eps=1e-3 if kind == "rms_eps" else None, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_()
    x = torch.randn(batch, *leading, *normalized, dtype=dtype)
    x = x if contiguous else scattered(x)
    check(layer, lambda: mixed_loss(layer(x)), batch)


@randomized
@given(
    dims=st.integers(0, 3),
    kind=st.sampled_from(["group", "instance", "instance_tracked", "instance_eval"]),
    dtype=dtypes,
    contiguous=st.booleans(),
)
def test_group_and_instance_norm(dims, kind, dtype, contiguous):
    torch.manual_seed(0)
    if kind == "group" or dims == 0:
        layer = nn.GroupNorm(2, 6, dtype=dtype)
    else:
        layer = INSTANCE[dims](6, affine=True, track_running_stats=kind != "instance", dtype=dtype)
        layer.train(kind != "instance_eval")
    with torch.no_grad():
        layer.weight.normal_()
    x = torch.randn(3, 6, *[4] * dims, dtype=dtype)
    x = x if contiguous else scattered(x)
    check(layer, lambda: mixed_loss(layer(x)), 3)


@pytest.mark.parametrize("kind", ["linear", "conv", "norm", "embedding"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_parameters_are_skipped(kind, frozen):
    layer, x = {
        "linear": (weight_normalize(nn.Linear(4, 3), "ours"), torch.randn(3, 5, 4)),
        "conv": (weight_normalize(nn.Conv2d(2, 3, 3), "torch"), torch.randn(3, 2, 5, 5)),
        "norm": (nn.LayerNorm(4), torch.randn(3, 5, 4)),
        "embedding": (weight_normalize(nn.Embedding(5, 4), "ours"), torch.randint(0, 5, (3, 4))),
    }[kind]
    list(layer.parameters())[-1 - frozen].requires_grad_(False)
    check(layer, lambda: mixed_loss(layer(x)), 3)


def test_a_subset_is_measured():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    x = torch.randn(3, 4)
    check(model, lambda: mixed_loss(model(x)), 3, parameters=list(model[1].parameters()))
    assert PerExampleNorms(model, list(model[1].parameters())).coverage == pytest.approx(6 / 21)


@pytest.mark.parametrize("spelling", ["ours", "torch"])
def test_zero_gain_gives_finite_norms(spelling):
    layer = weight_normalize(nn.Linear(4, 3, dtype=torch.float64), spelling)
    with torch.no_grad():
        layer.parametrizations.weight.original0[1] = 0.0
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    check(layer, lambda: mixed_loss(layer(x)), 3)


def test_zero_direction_gives_finite_norms():
    layer = weight_normalize(nn.Linear(4, 3, dtype=torch.float64), "ours")
    with torch.no_grad():
        layer.parametrizations.weight.original1[1] = 0.0
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    check(layer, lambda: mixed_loss(layer(x)), 3)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: nn.Conv1d(3, 2, 1), lambda: nn.LayerNorm(3)])
def test_folded_examples(make):
    torch.manual_seed(0)
    layer = make().double()
    x = (
        torch.randn(4, 5, 3, dtype=torch.float64)
        if not isinstance(layer, nn.Conv1d)
        else torch.randn(4, 5, 3, 6).double()
    )

    def run():
        return mixed_loss(layer(x.flatten(0, 1)).unflatten(0, (4, 5)))

    check(layer, run, 4, batch_dims={"": "folded"})
    with pytest.raises(PerExampleError, match="folded"):
        check(layer, run, 4)


def test_batch_in_the_second_dimension():
    layer = nn.Linear(3, 2).double()
    x = torch.randn(5, 4, 3).double()
    check(layer, lambda: mixed_loss(layer(x).transpose(0, 1)), 4, batch_dims={"*": 1})
    with pytest.raises(PerExampleError, match="batch_dims"):
        check(layer, lambda: mixed_loss(layer(x).transpose(0, 1)), 4)


def test_autocast():
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    x = torch.randn(6, 5, 16)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return mixed_loss(model(x).float())

    check(model, run, 6, tolerance=2e-2)


def test_autocast_sees_the_rounded_input():
    layer = nn.Linear(16, 8, bias=False)
    x = torch.full((4, 16), 1 + 2**-8)  # bfloat16 rounds it to 1

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).float().square().sum(1)

    check(layer, run, 4, tolerance=4e-3)


def test_half_precision_accumulates_in_float32():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).bfloat16()
    x = torch.randn(6, 5, 16).bfloat16()
    measured = check(model, lambda: mixed_loss(model(x).float()), 6, tolerance=3e-2)
    assert measured.dtype == torch.float32
