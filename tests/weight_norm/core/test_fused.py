"""torch's kernel and the written-out formula are one function, to any order of derivatives."""

import pytest
import torch
from torch import nn

from lightning_wn.weight_norm import apply_weight_norm
from lightning_wn.weight_norm.core import fused
from lightning_wn.weight_norm.core.parametrization import UnitLayout, compose

FIRST = UnitLayout()


def case(dtype=torch.float64, shape=(6, 5, 2)):
    v = torch.randn(shape, dtype=dtype, requires_grad=True)
    g = torch.rand(shape[0], *[1] * (len(shape) - 1), dtype=dtype, requires_grad=True)
    return g, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_equals_the_formula(dtype, monkeypatch):
    g, v = case(dtype)
    grad = torch.randn(v.shape, dtype=dtype).transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for supported in (True, False):
        if not supported:
            monkeypatch.setattr(fused, "_is_supported", lambda g, v: False)
        weight = compose(g, v, FIRST)
        assert (type(weight.grad_fn).__name__ == "_FusedBackward") == supported
        results.append((weight, *torch.autograd.grad(weight, (g, v), grad)))
    for ours, theirs in zip(*results, strict=True):
        # another order of summation
        torch.testing.assert_close(ours, theirs, rtol=2e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)


def test_second_derivatives_are_right():
    """Those of the kernel itself are not: ‖v‖ is a constant to it."""
    g, v = case()
    assert type(compose(g, v, FIRST).grad_fn).__name__ == "_FusedBackward"
    assert torch.autograd.gradgradcheck(lambda g, v: compose(g, v, FIRST), (g, v))


def test_a_hessian_through_a_layer_equals_finite_differences():
    layer = nn.Linear(3, 2).double()
    apply_weight_norm(layer)
    x = torch.randn(4, 3, dtype=torch.float64)
    v = layer.parametrizations.weight.original1

    def gradient(create_graph=False):
        return torch.autograd.grad(layer(x).square().sum(), v, create_graph=create_graph)[0]

    direction = torch.randn_like(v)
    (product,) = torch.autograd.grad((gradient(create_graph=True) * direction).sum(), v)
    step = 1e-6
    with torch.no_grad():
        v.add_(step * direction)
    above = gradient()
    with torch.no_grad():
        v.sub_(2 * step * direction)
    # central differences: of the order of step², and of rounding over step
    torch.testing.assert_close(product, (above - gradient()) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("frozen", ["g", "v"])
def test_one_of_both_may_be_frozen(frozen):
    g, v = case()
    {"g": g, "v": v}[frozen].requires_grad_(False)
    trained = {"g": v, "v": g}[frozen]
    compose(g, v, FIRST).sum().backward()
    assert trained.grad is not None
    assert {"g": g, "v": v}[frozen].grad is None


def test_transforms_of_functions_and_forward_derivatives():
    g, v = case()
    f = lambda g, v: compose(g, v, FIRST).square().sum()  # noqa: E731
    expected = torch.autograd.grad(f(g, v), v)[0]
    torch.testing.assert_close(torch.func.grad(f, 1)(g.detach(), v.detach()), expected)
    torch.testing.assert_close(torch.func.jacfwd(f, 1)(g.detach(), v.detach()), expected)
    batched = torch.func.vmap(torch.func.grad(f, 1), (None, 0))(g.detach(), torch.stack([v.detach(), 2 * v.detach()]))
    torch.testing.assert_close(batched[0], expected)
    assert torch.autograd.gradcheck(lambda g, v: compose(g, v, FIRST), (g, v), check_forward_ad=True)


def test_a_changed_v_is_noticed_before_backward():
    g, v = case()
    weight = compose(g, v, FIRST)
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weight.sum().backward()
