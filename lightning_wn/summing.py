"""In which precision sums are taken."""

from __future__ import annotations

import torch


def summing_dtype(device: torch.device) -> torch.dtype:
    """Return float64 where the device has it: sums that nearly cancel keep their digits there."""
    return torch.float32 if device.type == "mps" else torch.float64
