"""Named sums over the last updates: what a kernel adds up on the device, and what becomes of it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from s3_megatron.watch.events import Updates

# In this order in a float64 tensor, and in S3Statistics of kernels/cpu/step.h: sum of |u|; the largest |u|; how many
# |u| are above 0.9; how many u have the sign of their gradient, zeros not; how many elements there are.
FIELDS = ("sum", "largest", "saturated", "agreeing", "elements")
SUM, LARGEST, SATURATED, AGREEING, ELEMENTS = range(len(FIELDS))


def zeros(*rows: int, device: torch.device | str | None = None) -> Tensor:
    """Make statistics of nothing: float64 [*rows, 5] on ``device``."""
    return torch.zeros(*rows, len(FIELDS), dtype=torch.float64, device=device)


def merge_(into: Tensor, other: Tensor) -> None:
    """Add ``other``, of the same device, to ``into`` (modified in place); of the largest, the larger."""
    largest = torch.maximum(into[..., LARGEST], other[..., LARGEST])
    into += other
    into[..., LARGEST] = largest


def reduce_(statistics: Tensor) -> None:
    """Merge those of all ranks (modified in place); a collective, where there are ranks."""
    if dist.is_available() and dist.is_initialized():
        largest = statistics[..., LARGEST].clone()
        dist.all_reduce(statistics)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        statistics[..., LARGEST] = largest


def updates(statistics: Sequence[float]) -> Updates:
    """Make of one row what a person reads; None of no elements, and of what was not counted, which is NaN."""
    total, largest, saturated, agreeing, elements = statistics
    if not elements:
        return Updates()
    return Updates(
        mean=total / elements,
        max=total if total != total else largest,  # over ranks, the largest of a NaN and a number may be the number
        saturated=None if saturated != saturated else saturated / elements,
        agreement=None if agreeing != agreeing else agreeing / elements,
    )
