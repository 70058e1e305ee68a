"""States in one floating dtype, each by itself: m in float32 with r in bfloat16 would break |update| <= 1 by 2.4%."""

from collections.abc import Sequence

import torch
from torch import Tensor

from s3_megatron.kernels.formats.format import Format


class Dtype(Format):
    """Float32 or float64, which nothing rounds, or bfloat16, rounded to nearest even or stochastically."""

    def __init__(self, stored: torch.dtype) -> None:
        self.name = str(stored).removeprefix("torch.")
        self.columns = {"m": stored, "r": stored}
        self.computed = torch.promote_types(stored, torch.float32)
        self._stored = stored

    def read_pair(self, m: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.read(m), self.read(r)

    def write_pair(
        self, stored: tuple[Tensor, Tensor], m: Tensor, r: Tensor, *, moving: Tensor, seed: Tensor | None, first: int
    ) -> None:
        self.write_(stored[0], m, moving=moving, seed=seed, first=first)
        # r's noise must not be m's.
        self.write_(stored[1], r, moving=moving, seed=None if seed is None else seed ^ 0x5BD1E995, first=first)

    def to_full(self, stored: Sequence[Tensor]) -> list[Tensor]:
        return list(stored)

    def from_full(self, full: Sequence[Tensor]) -> list[Tensor]:
        return [x.to(self._stored) for x in full]

    def read(self, state: Tensor) -> Tensor:
        """Return a state in the precision computed in; the stored tensor itself where that is its own."""
        return state.to(self.computed)

    def write_(
        self, state: Tensor, values: Tensor, *, moving: Tensor | None = None, seed: Tensor | None, first: int
    ) -> None:
        """Store a state by itself; for the arguments see ``write_pair``."""
        rounded = self._rounded(values, seed, first)
        state.copy_(rounded if moving is None else torch.where(moving, rounded, state))

    def _rounded(self, values: Tensor, seed: Tensor | None, first: int) -> Tensor:
        if seed is None or self._stored != torch.bfloat16:
            return values.to(self._stored)
        # A random number below the weight of the last bit kept, added before the rest is cut off, carries into it with
        # the probability that makes the mean right.
        carry = _noise(values.numel(), seed, first).view(values.shape)
        bits = values.view(torch.int32)
        rounded = ((bits.to(torch.int64) + carry) >> 16 << 16).to(torch.int32).view(torch.float32)
        return torch.where(values.isfinite(), rounded, values).to(self._stored)


def _noise(count: int, seed: Tensor, first: int) -> Tensor:
    """Make 16 random bits an element, a hash of seed and number: as good on a device as on the host, and capturable."""
    z = torch.arange(first, first + count, dtype=torch.int64, device=seed.device) * 0x9E3779B1 + seed * 0x85EBCA77
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        z = (z ^ (z >> 15)) * factor & 0xFFFFFFFF
    return (z ^ (z >> 16)) & 0xFFFF
