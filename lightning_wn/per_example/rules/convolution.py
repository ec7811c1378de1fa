"""Rules for convolutions: with its input's patches laid out, a convolution is a linear layer over positions.

The same product of patches and output gradients as in Rochette et al. (arXiv 1912.06015), here by a batched
matrix product or, where there are few positions, by the Gram matrices of both factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # as torch's own documentation spells it
from torch import Tensor, nn

from lightning_wn.per_example.rules.errors import require_batch_dimension
from lightning_wn.per_example.rules.gradients import Dense, Form, Outer, examples_at_once, gram_is_cheaper
from lightning_wn.per_example.rules.registry import Seen, register_per_example_rule

AnyConv = nn.Conv1d | nn.Conv2d | nn.Conv3d
AnyConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def patches(
    x: Tensor, positions: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], *,
    groups: int,
) -> Tensor:  # fmt: skip
    """Lay out the part of the (padded) input that each position sees.

    Args:
        x: Shape (N, C, *space).
        positions: How many positions there are along each dimension of space.
        kernel: The window's size along each dimension.
        stride: Step from position to position.
        dilation: Step inside the window.
        groups: Groups of channels.

    Returns:
        Shape (N, groups, T, C/groups · K), with T positions and K elements of the window.
    """
    x = x.contiguous()
    batch, channels, *_ = x.shape
    batch_step, channel_step, *steps = x.stride()
    # positions last: copied in runs as long as a row of the input, not of a window
    size = (batch, groups, channels // groups, *kernel, *positions)
    move = [step * s for step, s in zip(steps, stride, strict=True)]
    inside = [step * d for step, d in zip(steps, dilation, strict=True)]
    windows = x.as_strided(size, (batch_step, channel_step * (channels // groups), channel_step, *inside, *move))
    return windows.reshape(batch, groups, channels // groups * math.prod(kernel), math.prod(positions)).mT


def _windows_times(
    factor: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], *, groups: int
) -> Form:
    """Return Σ_p factor_p ⊗ patch_p, with the patches of a few examples laid out at a time.

    Args:
        factor: Shape (N, F, *positions).
        x: Shape (N, C, *space), padded.
        kernel: The window's size along each dimension.
        stride: Step from position to position.
        dilation: Step inside the window.
        groups: Groups of the channels of both.
    """
    left = _grouped(factor, groups).mT
    width = x.shape[1] // groups * math.prod(kernel)

    def windows(some: Tensor) -> Tensor:
        return patches(some, factor.shape[2:], kernel, stride, dilation, groups=groups)

    if gram_is_cheaper(left.shape[2], left.shape[3], width):
        return Outer(left, windows(x))  # few positions, and so few patches
    some = examples_at_once(groups * left.shape[2] * width, x.device)
    pairs = zip(torch.split(left, some), torch.split(x, some), strict=True)
    return Dense(torch.cat([(part.mT @ windows(of)).flatten(1, 2) for part, of in pairs]))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, C, *space) -> (N, groups, C/groups, T)."""
    return x.flatten(2).reshape(len(x), groups, x.shape[1] // groups, -1)


@register_per_example_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: AnyConv, seen: Seen) -> dict[str, Form]:
    """Weight: Σ_p D_p ⊗ patch_p, group by group. Bias: Σ_p D_p."""
    require_batch_dimension(module, seen.input, len(module.kernel_size) + 2)
    forms: dict[str, Form] = {}
    if "weight" in seen.needed:
        # torch keeps the padding of every mode, 'same' and 'valid' included, in the order of F.pad
        padding = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        own = seen.input.conj().resolve_conj()
        x = F.pad(own, padding, mode=mode) if any(padding) else own
        forms["weight"] = _windows_times(
            seen.grad, x, module.kernel_size, module.stride, module.dilation, groups=module.groups
        )
    if "bias" in seen.needed:
        forms["bias"] = Dense(seen.grad.flatten(2).sum(2))
    return forms


@register_per_example_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: AnyConvTranspose, seen: Seen) -> dict[str, Form]:
    """Weight: Σ_p x_p ⊗ patch_p(D): input and output change places. Bias: Σ_p D_p."""
    require_batch_dimension(module, seen.input, len(module.kernel_size) + 2)
    forms: dict[str, Form] = {}
    if "weight" in seen.needed:
        assert not isinstance(module.padding, str)  # torch allows no names here
        padding = [n for p in reversed(module.padding) for n in (p, p)]
        forms["weight"] = _windows_times(
            seen.input.conj().resolve_conj(),
            F.pad(seen.grad, padding),
            module.kernel_size,
            module.stride,
            module.dilation,
            groups=module.groups,
        )
    if "bias" in seen.needed:
        forms["bias"] = Dense(seen.grad.flatten(2).sum(2))
    return forms
