"""The curvature-weighted noise scale, by Hessian-vector products at fixed weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_wn.noise_scale.norms import sum_of_squares
from lightning_wn.noise_scale.samples import GradientSamples
from lightning_wn.summing import summing_dtype


def curvature_samples(
    parameters: Sequence[nn.Parameter],
    hessian_loss: Callable[[], Tensor],
    losses: Iterable[tuple[Callable[[], Tensor], float | Tensor]],
) -> GradientSamples:
    """Measure gᵀHg of a few gradient samples, with the Hessian of a batch that none of them has seen.

    With E[g_k] = G and Cov[g_k] = Σ/n_k, independent of H, E[g_kᵀ H g_k] = GᵀHG + tr(HΣ)/n_k, and the mean ḡ of K
    samples has E[ḡᵀ H ḡ] = GᵀHG + tr(HΣ) Σ 1/(K² n_k): the two equations of the simple noise scale with GᵀHG in the
    place of |G|² and tr(HΣ) in that of tr(Σ). Their ratio is B_noise (McCandlish et al., arXiv 1812.06162,
    section 2.2). Neither is positive for sure: H need not be definite.

    Takes one pass with a graph that can be differentiated twice, and for each sample a pass and a Hessian-vector
    product; the memory of four gradients, and of that graph.

    Args:
        parameters: What the Hessian is of.
        hessian_loss: Computes the mean loss of the batch that gives H.
        losses: For each sample what computes its batch's mean loss, and the examples n_k in it; two or more.

    Returns:
        The samples, with gᵀHg in the place of squared norms; a random state that the losses need is the caller's.

    Raises:
        ValueError: If the loss cannot be differentiated twice. An operation of the user's own that is marked
            ``once_differentiable`` and comes last of all hides that from autograd, and counts as linear.
    """
    with twice_differentiable(), torch.enable_grad():
        slopes = gradients_or_zeros(hessian_loss(), parameters, create_graph=True)
        if ends_in_an_error(slopes):
            raise _not_twice("the model has an operation that is marked `once_differentiable`")
        return gradient_samples(parameters, losses, partial(_hessian_product, slopes, parameters))


def gradient_samples(
    parameters: Sequence[nn.Parameter],
    losses: Iterable[tuple[Callable[[], Tensor], float | Tensor]],
    product: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> GradientSamples:
    """Measure |g|² of the gradient of each batch's loss, and of their mean; only running sums are kept.

    Args:
        parameters: What to differentiate by.
        losses: For each sample what computes its batch's mean loss, and the examples in it.
        product: From a gradient g to Hg, to measure gᵀHg.
    """
    device = parameters[0].device
    like = torch.zeros((), device=device, dtype=summing_dtype(device))
    totals: list[list[Tensor]] = []
    sq_norms: list[Tensor] = []
    sizes: list[float | Tensor] = []
    for loss, size in losses:
        gradients = gradients_or_zeros(loss(), parameters)
        factors = [gradients] if product is None else [gradients, product(gradients)]
        sq_norms.append(_squared(factors, like))
        sizes.append(size)
        for total, factor in zip(totals, factors, strict=False):
            torch._foreach_add_(total, factor)
        totals = totals or [[tensor.clone() for tensor in factor] for factor in factors]
    count = len(sizes)
    return GradientSamples(
        sq_norms=torch.stack(sq_norms),
        sizes=torch.stack([torch.as_tensor(size, dtype=like.dtype).to(device) for size in sizes]),
        weights=[1.0 / count] * count,
        grad_sq_norm=_squared(totals, like) / count**2,
        examples=sizes[0],
        micro_batches=1,
        counted=sum(sizes),
        parts=count,
    )


def _squared(factors: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """Return |g|² of one factor, the product of two."""
    if len(factors) == 1:
        return sum_of_squares(factors[0], like)
    products = [torch.sum(a * b, dtype=like.dtype) for a, b in zip(*factors, strict=True)]
    return torch.stack(products).sum()


def gradients_or_zeros(loss: Tensor, parameters: Sequence[nn.Parameter], *, create_graph: bool = False) -> list[Tensor]:
    """Return the gradient of the loss by each parameter, dense, zeros where it does not depend on one."""
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True, create_graph=create_graph)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]


def _hessian_product(
    slopes: Sequence[Tensor], parameters: Sequence[nn.Parameter], vector: Sequence[Tensor]
) -> list[Tensor]:
    """Return Hv from the gradient with its graph."""
    # in a parameter that the loss is linear in, the gradient does not depend on any
    curved = [(slope, v) for slope, v in zip(slopes, vector, strict=True) if slope.requires_grad]
    if not curved:
        raise _not_twice("its gradient depends on no parameter, as if the loss were linear")
    try:
        found = torch.autograd.grad(
            [slope for slope, _ in curved],
            list(parameters),
            [v for _, v in curved],
            allow_unused=True,
            retain_graph=True,
        )
    except RuntimeError as error:
        raise _not_twice(f"the model has an operation that cannot be ({error})") from error
    return [torch.zeros_like(p) if h is None else h for p, h in zip(parameters, found, strict=True)]


def ends_in_an_error(slopes: Sequence[Tensor]) -> bool:
    """Whether autograd left a node that stands for a missing derivative, and that nothing would run into."""
    waiting = [slope.grad_fn for slope in slopes if slope.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name().endswith("::Error"):
            return True
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
    return False


def _not_twice(reason: str) -> ValueError:
    return ValueError(
        f"The curvature-weighted noise scale differentiates the loss twice, and {reason}; measure without curvature, "
        "or use an implementation that can be differentiated twice, such as eager attention."
    )


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Choose implementations that have a second derivative: fused attention and cuDNN's recurrent layers do not."""
    flags: Any = torch.backends.cudnn.flags
    with sdpa_kernel(SDPBackend.MATH), flags(enabled=False):
        yield
