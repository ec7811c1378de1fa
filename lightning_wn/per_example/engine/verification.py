"""Whether what was seen of a step is all there was: the parts must add up to each parameter's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_wn.per_example.rules.errors import PerExampleError
from lightning_wn.per_example.rules.gradients import Common, Form, dense_chunks
from lightning_wn.weight_norm.core.forward import call_forward

_SAMPLED = 2048


class Verification:
    """Compares a sample of every parameter's gradient with the sum of what the layers saw of it.

    A layer's part is computed by autograd from the input and the output gradient that its rule was given. So a
    parameter that is used past its module's forward, a missed call or an output gradient from the wrong
    place are found; the rules themselves are not in question here.

    Args:
        model: The model, for names.
        parameters: The measured parameters.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._parameters = parameters
        self._arrived: dict[int, Tensor] = {}
        self._expected: dict[int, Tensor] = {}
        self._low_precision = False
        self._handles = [p.register_hook(self._hook(id(p))) for p in parameters]  # type: ignore[no-untyped-call]  # torch's

    def _hook(self, key: int) -> Any:
        def see(grad: Tensor) -> None:
            self._low_precision |= grad.dtype.itemsize < 4
            self._arrived[key] = self._arrived.get(key, 0.0) + _sample(grad)

        return see

    def add_call(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], leaves: Sequence[Any], spec: Any, grad: Tensor
    ) -> None:
        """Add the part of one call of a layer that has a rule."""
        self._low_precision |= grad.dtype.itemsize < 4
        wide = torch.promote_types(grad.dtype, torch.float32)
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            free = {name: p.detach().to(wide).requires_grad_() for name, p in parameters.items()}
            others = {name: t.detach().to(wide) for name, t in module.named_parameters() if name not in free}
            # the module may update its buffers, but not twice a step
            buffers = {
                name: t.to(wide if t.is_floating_point() else t.dtype, copy=True) for name, t in module.named_buffers()
            }
            leaves = [t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            output = call_forward(module, others | free | buffers, args, kwargs)
            parts = torch.autograd.grad(output, list(free.values()), grad.to(wide), allow_unused=True)
        for parameter, part in zip(parameters.values(), parts, strict=True):
            if part is not None:
                self.add_part(parameter, part)

    def add_part(self, parameter: nn.Parameter, part: Tensor) -> None:
        """Add a part of one parameter's gradient."""
        self._expected[id(parameter)] = self._expected.get(id(parameter), 0.0) + _sample(part)

    def add_form(self, parameter: nn.Parameter, form: Form) -> None:
        """Add the part of a parameter's gradient that is known example by example."""
        for some in dense_chunks([form], parameter.shape):
            self.add_part(parameter, some.sum(0))

    def add_common(self, common: Mapping[int, Common]) -> None:
        """Add what terms of weights alone give each parameter, by identity."""
        for parameter in self._parameters:
            if id(parameter) in common:
                self.add_part(parameter, common[id(parameter)].grad)

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self) -> bool:
        """Compare; waits for the device.

        Returns:
            False if nothing can be said, because a gradient is not finite.

        Raises:
            PerExampleError: If a parameter's gradient has parts that were not seen.
        """
        rows: dict[str, Tensor] = {}
        for parameter in self._parameters:
            arrived = self._arrived.get(id(parameter), torch.zeros(()))
            difference = arrived.cpu() - self._expected.get(id(parameter), torch.zeros(())).cpu()
            if difference.ndim:  # unless there was neither
                norms = [difference.norm(), arrived.cpu().norm()]
                rows[self._names[id(parameter)]] = torch.stack([norm.double() for norm in norms])
        if not rows:
            return True
        differences, sizes = torch.stack(list(rows.values())).unbind(1)
        if not bool(torch.isfinite(sizes).all()):
            return False
        tolerance = 5e-2 if self._low_precision else 1e-3
        # a gradient that is zero but for rounding (the key bias of attention) is judged by the others
        wrong = ~(differences <= tolerance * (sizes + 1e-2 * sizes.max()))
        if bool(wrong.any()):
            name = list(rows)[int(wrong.nonzero()[0])]
            raise PerExampleError(
                f"parameter {name!r} got a gradient that its module's forward does not account for (it is used past "
                "that forward, a hook on the parameter edits its gradient, or the module mixes examples): use it in "
                "its module's forward alone, or register the module that uses it with "
                "`lightning_wn.per_example.measure_as_one`"
            )
        return True


def _sample(grad: Tensor) -> Tensor:
    grad = grad.detach()
    flat = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
    flat = flat[:: max(1, len(flat) // _SAMPLED)]
    return flat.to(torch.promote_types(flat.dtype, torch.float32)).clone()
