"""The mathematics: values, gradients, extreme units."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_wn.weight_norm import apply_weight_norm
from lightning_wn.weight_norm.core.parametrization import UnitLayout, compose, decompose, unit_norm

FIRST = UnitLayout()
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def units_by_loops(weight, layout):
    """Every output unit's entries, found index by index."""
    if not layout.transposed:
        return [weight[o].flatten() for o in range(weight.shape[0])]
    per_group = weight.shape[0] // layout.groups
    return [
        torch.cat([weight[group * per_group + i, j].flatten() for i in range(per_group)])
        for group in range(layout.groups)
        for j in range(weight.shape[1])
    ]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 7), FIRST),
        ((6, 2, 3, 3), FIRST),
        ((4, 6, 3), UnitLayout(transposed=True)),
        ((4, 3, 3, 2), UnitLayout(transposed=True, groups=2)),
        ((6, 1, 2, 2, 3), UnitLayout(transposed=True, groups=6)),
    ],
)
def test_norm_and_value_match_loops_over_units(shape, layout):
    v = torch.randn(shape, dtype=torch.float64)
    norms = torch.stack([unit.norm() for unit in units_by_loops(v, layout)])
    torch.testing.assert_close(unit_norm(v, layout).flatten(), norms)
    g = torch.rand(len(norms), dtype=torch.float64) + 0.5
    w = compose(layout.gain(g.view(unit_norm(v, layout).shape)), v, layout)
    for unit, direction, length, norm in zip(
        units_by_loops(w, layout), units_by_loops(v, layout), g, norms, strict=True
    ):
        torch.testing.assert_close(unit, length * direction / norm)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_unit_is_what_makes_one_output_channel(groups, dims):
    """Zeroing unit c of the weight silences output channel c and no other."""
    layer = getattr(nn, f"ConvTranspose{dims}d")(4, 8, 2, groups=groups, bias=False)
    layout = UnitLayout(transposed=True, groups=groups)
    x = torch.randn(2, 4, *[3] * dims)
    for channel in range(8):
        g, v = decompose(layer.weight, layout)
        g.view(-1)[channel] = 0
        with torch.no_grad():
            out = torch.nn.functional.__dict__[f"conv_transpose{dims}d"](x, compose(g, v, layout), groups=groups)
        silent = out.abs().amax(dim=[0, *range(2, 2 + dims)]) == 0
        assert silent.nonzero().flatten().tolist() == [channel]


@pytest.mark.parametrize("layout", [FIRST, UnitLayout(transposed=True), UnitLayout(transposed=True, groups=2)])
def test_gradcheck(layout):
    v = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    g = torch.rand_like(decompose(v, layout)[0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, v: compose(g, v, layout), (g, v))
    assert torch.autograd.gradgradcheck(lambda g, v: compose(g, v, layout), (g, v))


@pytest.mark.parametrize("layout", [FIRST, UnitLayout(transposed=True), UnitLayout(transposed=True, groups=2)])
def test_gradients_match_the_papers_formulas(layout):
    """Equation 3: dg = <dw, v>/|v|, dv = g/|v| dw - g dg/|v|² v; so dv is orthogonal to v."""
    v = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    g = (decompose(v, layout)[0] * 1.7).requires_grad_()
    dw = torch.randn_like(v)
    compose(g, v, layout).backward(dw)
    units = zip(
        *(units_by_loops(t, layout) for t in (v.detach(), dw, v.grad)),
        g.flatten(),
        g.grad.flatten(),
        strict=True,
    )
    for v_unit, dw_unit, dv_unit, g_unit, dg_unit in units:
        norm = v_unit.norm()
        torch.testing.assert_close(dg_unit, dw_unit @ v_unit / norm)
        torch.testing.assert_close(dv_unit, g_unit / norm * dw_unit - g_unit * dg_unit / norm**2 * v_unit)
        assert abs(float(dv_unit @ v_unit)) < 1e-13


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv1d(4, 6, 3, groups=2), nn.Conv3d(2, 3, 2)])
def test_gradients_match_torchs_weight_norm(layer):
    layer = layer.double()
    theirs = type(layer)(**_arguments(layer)).double()
    theirs.load_state_dict(layer.state_dict())
    apply_weight_norm(layer)
    parametrizations.weight_norm(theirs)
    dw = torch.randn_like(layer.weight)
    for module in (layer, theirs):
        with torch.no_grad():
            module.parametrizations.weight.original0.mul_(1.3)
            module.parametrizations.weight.original1.add_(0.2)
        module.weight.backward(dw)
    # the same formula in another order of operations: equal to float64 rounding
    torch.testing.assert_close(layer.weight, theirs.weight, rtol=1e-12, atol=1e-14)
    for i in range(2):
        ours, other = (getattr(m.parametrizations.weight, f"original{i}") for m in (layer, theirs))
        assert ours.shape == other.shape
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-10, atol=1e-13)


def _arguments(layer):
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "groups": layer.groups,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [FIRST, UnitLayout(transposed=True), UnitLayout(transposed=True, groups=2)])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 40.0])
def test_the_round_trip_is_bit_equal(dtype, layout, scale):
    # many units: a ratio that is 1 only to rounding shows in some of them
    weight = (torch.randn(64, 96, 3) * scale).to(dtype)
    g, v = decompose(weight, layout)
    assert g.dtype == v.dtype == dtype
    assert torch.equal(compose(g, v, layout), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [3e-45, 1e-41, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37])
def test_units_whose_squares_leave_the_range_are_bit_equal_and_train(dtype, scale):
    weight = torch.randn(6, 20, dtype=torch.float64)
    weight[3:] *= scale
    weight = weight.to(dtype)
    g, v = (t.requires_grad_() for t in decompose(weight, FIRST))
    w = compose(g, v, FIRST)
    assert torch.equal(w, weight)
    w.float().sum().backward()
    assert torch.isfinite(g.grad).all()
    assert torch.isfinite(v.grad).all()
    alive = (weight != 0).any(1)
    direction = weight[alive].double() / weight[alive].double().norm(dim=1, keepdim=True)
    # float32's and bfloat16's rounding of a sum of 20 terms
    torch.testing.assert_close(
        g.grad[alive].flatten().double(),
        direction.sum(1),
        rtol=0,
        atol=1e-4 if dtype == torch.float32 else 0.1,
    )


def test_float64_units_beyond_the_range_of_squares():
    scales = torch.tensor([[1.0], [1e-320], [1e-200], [1e200]], dtype=torch.float64)
    weight = torch.randn(4, 9, dtype=torch.float64) * scales
    assert torch.equal(compose(*decompose(weight, FIRST), FIRST), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [FIRST, UnitLayout(transposed=True), UnitLayout(transposed=True, groups=2)])
def test_zero_units_are_zero_now_and_learn_later(dtype, layout):
    weight = torch.randn(8, 6, 4).to(dtype)
    units = layout.by_unit(weight)
    units[(0,) * layout.leading] = 0
    units[(-1,) * layout.leading] = 0
    state = torch.get_rng_state()
    g, v = (t.requires_grad_() for t in decompose(weight, layout))
    assert torch.equal(torch.get_rng_state(), state)  # the user's random numbers are not touched
    w = compose(g, v, layout)
    assert torch.equal(w, weight)
    dead = g.flatten() == 0
    assert int(dead.sum()) == 2
    dw = torch.randn_like(w)
    w.backward(dw)
    assert torch.isfinite(g.grad).all()
    assert torch.isfinite(v.grad).all()
    directions = [u.double() for u, d in zip(units_by_loops(v.detach(), layout), dead, strict=True) if d]
    for direction, unit_dw, dg in zip(
        directions,
        [u for u, d in zip(units_by_loops(dw, layout), dead, strict=True) if d],
        g.grad.flatten()[dead],
        strict=True,
    ):
        assert abs(float(direction.norm()) - 1) < 0.01
        assert dg != 0
        assert abs(float(dg) - float(unit_dw.double() @ direction)) < 0.05
    assert not torch.allclose(directions[0], directions[1])
    again = decompose(weight, layout)[1]
    assert torch.equal(again, v)


def test_an_all_zero_residual_projection_learns():
    # a target across the random first direction takes longer than these steps
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(layer.weight)
    apply_weight_norm(layer)
    target = torch.randn(4, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), target, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loaded_zero_direction_is_finite(dtype):
    g = torch.tensor([[2.0], [0.0], [1.0]], dtype=dtype, requires_grad=True)
    v = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]], dtype=dtype, requires_grad=True)
    w = compose(g, v, FIRST)
    assert torch.equal(w[:2], torch.zeros(2, 2, dtype=dtype))
    (w * torch.tensor([1.0, 3.0], dtype=dtype)).sum().backward()
    assert torch.isfinite(g.grad).all()
    assert torch.isfinite(v.grad).all()
    assert v.grad[0].abs().sum() > 0  # it can leave zero


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinite"),
        (torch.full((1, 4), 6e4, dtype=torch.float16), "norm beyond the range of torch.float16"),
        (torch.tensor([[1e30, 1e-35]]), "more than the range of torch.float32"),
        (torch.zeros(3, 0), "empty"),
    ],
)
def test_what_cannot_be_represented_is_refused_in_words(weight, words):
    with pytest.raises(ValueError, match=words):
        decompose(weight, FIRST)


def test_memory_format_is_kept():
    for layout in (FIRST, UnitLayout(transposed=True), UnitLayout(transposed=True, groups=2)):
        weight = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
        g, v = decompose(weight, layout)
        assert v.stride() == weight.stride() == compose(g, v, layout).stride()


def test_an_assigned_weight_is_copied():
    layer = nn.Linear(3, 2)
    apply_weight_norm(layer)
    assigned = torch.randn(2, 3)
    layer.weight = assigned
    assert torch.equal(layer.weight, assigned)
    with torch.no_grad():
        layer.parametrizations.weight.original1.zero_()
    assert assigned.abs().sum() > 0


def test_autocast_gives_the_plain_layers_output():
    for dtype, layer in itertools.product([torch.bfloat16], [nn.Linear(9, 5), nn.Conv1d(9, 5, 2)]):
        x = torch.randn(3, 9) if isinstance(layer, nn.Linear) else torch.randn(3, 9, 4)
        with torch.autocast("cpu", dtype=dtype):
            before = layer(x)
            apply_weight_norm(layer)
            assert torch.equal(layer(x), before)
