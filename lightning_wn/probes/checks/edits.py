"""Whether somebody edits a gradient between the backward pass and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_wn.noise_scale.samples import NUM_CHECKSUMS, GradientSamples
from lightning_wn.probes.checks.checksums import Projection


def with_deviation(samples: GradientSamples, deviation: Tensor) -> GradientSamples:
    """Give samples checksums by which the optimizer's gradient differs from them, relatively so much, shape ()."""
    ones = torch.ones(NUM_CHECKSUMS, device=samples.sq_norms.device, dtype=samples.sq_norms.dtype)
    # a gradient that was not rescaled as a whole differs in both directions
    signs = torch.tensor([1.0, -1.0] * NUM_CHECKSUMS, dtype=ones.dtype)[:NUM_CHECKSUMS].to(ones.device)
    return replace(
        samples,
        checksums=ones.expand(len(samples.sq_norms), -1),
        grad_checksums=ones + signs * deviation.to(ones),
    )


class EditWatch:
    """Compares what backward passes gave with ``Parameter.grad`` at the optimizer's step, in a few elements of each.

    Args:
        parameters: Whose gradients to watch.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        # training must draw the same random numbers with and without a probe
        generator = torch.Generator().manual_seed(0)
        self._projections = [Projection(p, 0, generator) for p in self._parameters]
        self._handles: list[RemovableHandle] = []
        self._seen: dict[int, Tensor] = {}

    def start_step(self) -> None:
        """Forget the last step."""
        self.detach()
        self._seen.clear()

    def attach(self) -> None:
        """Watch a backward pass; others may differentiate in between, and no hook is on the model then."""
        self.detach()
        for index, parameter in enumerate(self._parameters):
            if not parameter.requires_grad:  # switched off, while another optimizer's network trains
                continue
            handle = parameter.register_hook(self._hook(index))  # type: ignore[no-untyped-call]  # torch's
            self._handles.append(handle)
            # before hooks that edit the gradient
            hooks: Any = parameter._backward_hooks
            if hooks is not None and len(hooks) > 1:
                hooks.move_to_end(handle.id, last=False)

    def detach(self) -> None:
        """Remove the hooks; what they saw stays until the next step."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def compare(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """Return the factor that the gradients were multiplied with, and the largest relative difference beyond it.

        The difference is that of one parameter's elements, relative to their size. The factor is None where
        no backward pass was seen.
        """
        device = self._parameters[0].device
        before, after = [], []
        for index, (parameter, projection) in enumerate(zip(self._parameters, self._projections, strict=True)):
            seen, gradient = self._seen.get(index), parameter.grad
            if seen is None and gradient is None:
                continue
            picked = projection.pick(gradient.detach()) if gradient is not None else None
            like = seen if seen is not None else picked
            assert like is not None
            pair = [torch.zeros_like(like) if part is None else part for part in (seen, picked)]
            was, now = (_real(part).to(device, dtype) for part in pair)
            before.append(was)
            after.append(now)
        if not before:
            return None, torch.zeros((), device=device, dtype=dtype)
        # complex elements count twice
        length = max(len(part) for part in before)
        was, now = (
            torch.stack([nn.functional.pad(part, (0, length - len(part))) for part in parts])
            for parts in (before, after)
        )
        factor = (was * now).sum() / was.square().sum()
        factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
        sizes = torch.linalg.vector_norm(was, dim=1) * factor
        differences = torch.linalg.vector_norm(now - factor * was, dim=1)
        tiny = torch.finfo(dtype).tiny
        return factor, (differences / sizes.clamp_min(tiny)).clamp_max(1.0).max()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        projection, seen = self._projections[index], self._seen

        def see_gradient(gradient: Tensor) -> None:
            if gradient.layout is not torch.strided:  # the probe refuses it when it comes to the step
                return
            picked = projection.pick(gradient.detach())
            before = seen.get(index)
            seen[index] = picked.clone() if before is None else before + picked

        return see_gradient


def _real(values: Tensor) -> Tensor:
    return torch.view_as_real(values).flatten() if values.is_complex() else values
