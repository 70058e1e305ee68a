"""A DTensor whole, and its replicas compared, for the checks on ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(x: Tensor) -> Tensor:
    """All of ``x``, detached, whether it is distributed or not."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def replicas_are_equal(x: DTensor, where: object) -> None:
    """Assert that wherever ``x`` is replicated the ranks have the same bits of it."""
    mine = x.to_local().detach()
    for dim in range(x.device_mesh.ndim):
        if x.placements[dim].is_replicate():
            others = [torch.empty_like(mine) for _ in range(x.device_mesh.size(dim))]
            dist.all_gather(others, mine, group=x.device_mesh.get_group(dim))
            assert all(torch.equal(mine, other) for other in others), f"{where}: replicas differ"
