"""How m and r are stored: the seam at which another format enters.

The C++ loop has its own pair of functions for it (``load`` and ``store_state``), and so has the Triton kernel
(``load_state`` and ``store_state``). Both states always have one format: m in float32 with r in bfloat16 would break
|update| <= 1 by 2.4%.
"""

import torch
from torch import Tensor

# Stored dtypes and the precision they are computed in.
FORMATS = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}


def read(state: Tensor) -> Tensor:
    """Return m or r in the precision it is computed in; the stored tensor itself where that is its own."""
    return state.to(FORMATS[state.dtype])


def write_(state: Tensor, values: Tensor, *, seed: Tensor | None = None, first: int = 0) -> None:
    """Store new values (modified in place), rounded to nearest even, or stochastically with a seed.

    Args:
        state: m or r as stored.
        values: the new values, of the same shape.
        seed: one int64 on the same device, or None; matters to bfloat16 only.
        first: number of the first element, so that each has noise of its own.
    """
    if seed is None or state.dtype != torch.bfloat16:
        state.copy_(values)
        return
    # A random number below the weight of the last bit kept, added before the rest is cut off, carries into it with the
    # probability that makes the mean right.
    carry = _noise(values.numel(), seed, first).view(values.shape)
    bits = values.view(torch.int32)
    rounded = ((bits.to(torch.int64) + carry) >> 16 << 16).to(torch.int32).view(torch.float32)
    state.copy_(torch.where(values.isfinite(), rounded, values))


def _noise(count: int, seed: Tensor, first: int) -> Tensor:
    """Make 16 random bits an element, a hash of seed and number: as good on a device as on the host, and capturable."""
    z = torch.arange(first, first + count, dtype=torch.int64, device=seed.device) * 0x9E3779B1 + seed * 0x85EBCA77
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        z = (z ^ (z >> 15)) * factor & 0xFFFFFFFF
    return (z ^ (z >> 16)) & 0xFFFF
