"""A matrix that tensor-parallel ranks have in parts, and that is no DTensor: whole on each, or mapped in parts."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """How the ranks of ``group`` share a matrix [rows, cols]: in their order along ``dim``, in parts of one size.

    Attributes:
        group: those ranks.
        dim: 0 or 1.
        is_gathered: whether each rank has the whole matrix made, and maps it; else the ranks map it together.
    """

    group: dist.ProcessGroup
    dim: int
    is_gathered: bool

    @property
    def mine(self) -> int:
        """This rank's number among them."""
        return dist.get_rank(self.group)

    def whole(self, part: Tensor) -> Tensor:
        """Gather the parts; all ranks of the group come here."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.group.size())]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=self.dim)

    def part(self, whole: Tensor) -> Tensor:
        """Take this rank's part."""
        return whole.chunk(self.group.size(), dim=self.dim)[self.mine]

    def largest(self, mine: Tensor) -> Tensor:
        """Return the element-wise maximum over the ranks."""
        largest = mine.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest
