"""Per-example squared norms by brute force, and the comparison with what the probe measures."""

import pytest
import torch
from torch import nn

from lightning_wn.per_example import PerExampleNorms

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def mixed_loss(output):
    """A loss per example, shape (B,), with a different gradient at every element of the output."""
    flat = output.flatten(1)
    weights = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype, device=flat.device)
    return (flat * weights).sum(1) + 0.5 * flat.sin().square().sum(1)


def per_example_gradients(parameters, losses):
    """One backward pass an example through the same graph, in which random numbers are the same too."""
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses]
    return [torch.stack([row[k].to_dense().double() for row in rows]) for k in range(len(parameters))]


def sq_norms(gradients):
    return torch.stack([g.square().reshape(len(g), -1).sum(1) for g in gradients]).sum(0)


def brute_force(parameters, losses):
    return sq_norms(per_example_gradients(parameters, losses))


def measure(model, parameters, run, batch_size, *, steps=1, norms=None, **options):
    """Measure ``steps`` times; ``run`` returns the losses of all examples, their mean is back-propagated."""
    norms = norms or PerExampleNorms(model, parameters, **options)
    norms.attach()
    for _ in range(steps):
        state = torch.get_rng_state()
        for p in parameters:
            p.grad = None
        norms.before_forward(batch_size)
        loss = run().mean()
        norms.before_backward(loss)
        loss.backward()
        measured = norms.after_backward()
        require_agreement(norms)
    norms.detach()
    return measured, state


def require_agreement(norms, factor=1.0):
    """The guard of every measured step: examples add up to the gradient, in each parameter."""
    found, difference = norms.blocks.compare(norms.elements, norms.blocks.of_gradient(norms.elements.values.device))
    # the guard's own tolerance is 0.01, and 0.05 for what is computed in 16 bits
    assert difference < (0.05 if norms.low_precision else 1e-3) or not torch.isfinite(difference)
    assert found == pytest.approx(factor, rel=0.02 if norms.low_precision else 1e-4) or not torch.isfinite(difference)


def check(model, run, batch_size, *, parameters=None, tolerance=None, steps=2, **options):
    """Compare with brute force; two steps, of which only the first is verified by the probe itself."""
    parameters = [p for p in (parameters or model.parameters()) if p.requires_grad]
    measured, state = measure(model, parameters, run, batch_size, steps=steps, **options)
    torch.set_rng_state(state)
    expected = brute_force(parameters, run() / batch_size)
    assert measured.shape == (batch_size,)
    assert measured.dtype in (torch.float32, torch.float64)
    tolerance = tolerance or TOLERANCE[parameters[0].dtype]
    torch.testing.assert_close(measured.double(), expected, rtol=tolerance, atol=1e-30)
    return measured


def gradient_sq_norm(parameters):
    return sum(p.grad.double().square().sum() for p in parameters if p.grad is not None)


class Scaled(nn.Module):
    """Runs a model on an input that requires a gradient, as in the middle of a network."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x * 1.0)
