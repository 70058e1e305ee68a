"""Sharded matrices, whole on one rank each: the ranks share the work of a map that needs whole matrices."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from s3_megatron.optim.tensor_parallel import Cut


class Matrices:
    """Some matrices of one shape and placement, of which each rank of their mesh has some to map, whole.

    Plain tensors, stacks that are sharded between their matrices, and placements of other kinds than Shard and
    Replicate are all mapped on every rank that has them, and so is a matrix that tensor-parallel ranks share.

    Attributes:
        mine: the whole matrices, or stacks, that this rank maps; a part of one that ranks map together.
        is_counted: whether they are this rank's alone.
    """

    def __init__(self, params: list[Tensor], parts: list[Tensor], cut: Cut | None = None) -> None:
        """Gather; with DTensors all ranks of the mesh come here, with the same number of matrices.

        Args:
            params: the weights, which say how the matrices are placed.
            parts: this rank's parts of the matrices, each like the local part of its weight.
            cut: which ranks share plain tensors.
        """
        self.like, self.parts, self.cut = params[0], parts, cut
        self.way = "local" if cut is None or not cut.is_gathered else "gather"
        if isinstance(self.like, DTensor):
            dims = {p.dim if type(p) is Shard else None if p.is_replicate() else -1 for p in self.like.placements}
            # Within the matrices of a stack, or shards that are no plain ones.
            if -1 in dims or (self.like.ndim == 3 and dims - {0, None}):
                self.way = "copy"
            elif self.like.ndim == 2 and dims != {None}:
                self.way = "share"
        ways = {"local": self._local, "gather": self._gather, "copy": self._copy, "share": self._share}
        self.mine = ways[self.way]()

    @property
    def is_counted(self) -> bool:
        """Whether no other rank of the mesh, or before it in the cut, maps the same matrices."""
        if self.way == "gather":
            assert self.cut is not None
            return self.cut.mine == 0
        if self.way == "share" or not isinstance(self.like, DTensor):
            return True
        place = self.like.device_mesh.get_coordinate()
        copies = [self.way == "copy" or p.is_replicate() for p in self.like.placements]
        return place is not None and not any(i for i, is_copy in zip(place, copies, strict=True) if is_copy)

    def back(self, results: list[Tensor]) -> list[Tensor]:
        """Return this rank's part of every matrix's result, from the results of ``mine``."""
        if self.way == "local":
            return results
        if self.way == "gather":
            assert self.cut is not None
            return [self.cut.part(x) for x in results]
        like = self._dtensor()
        if self.way == "copy":
            everywhere = [Replicate()] * like.device_mesh.ndim
            whole = (DTensor.from_local(x, like.device_mesh, everywhere, run_check=False) for x in results)
            return [x.redistribute(placements=like.placements).to_local() for x in whole]
        shape = (0, *like.shape)
        stack = torch.stack(results) if results else self.parts[0].new_empty(shape, dtype=torch.float32)
        shared = self._sharded(stack, self._by_matrix())
        return list(shared.redistribute(placements=self._by_part()).to_local().unbind())

    def _local(self) -> list[Tensor]:
        return self.parts

    def _gather(self) -> list[Tensor]:
        assert self.cut is not None
        return [self.cut.whole(x) for x in self.parts]

    def _copy(self) -> list[Tensor]:
        like = self._dtensor()
        return [
            DTensor.from_local(
                x, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            ).full_tensor()
            for x in self.parts
        ]

    def _share(self) -> list[Tensor]:
        """From a part of every matrix on every rank to whole matrices on each: one all-to-all."""
        sharded = self._sharded(torch.stack(self.parts), self._by_part())
        return list(sharded.redistribute(placements=self._by_matrix()).to_local().unbind())

    def _dtensor(self) -> DTensor:
        assert isinstance(self.like, DTensor)
        return self.like

    def _sharded(self, stack: Tensor, placements: list[Shard | Replicate]) -> DTensor:
        shape = torch.Size((len(self.parts), *self.like.shape))
        stride = (shape[1] * shape[2], shape[2], 1)
        mesh = self._dtensor().device_mesh
        return DTensor.from_local(stack.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)

    def _by_part(self) -> list[Shard | Replicate]:
        return [Shard(p.dim + 1) if isinstance(p, Shard) else Replicate() for p in self._dtensor().placements]

    def _by_matrix(self) -> list[Shard | Replicate]:
        return [Shard(0)] * self._dtensor().device_mesh.ndim


def batches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Part weights into those that are gathered together: as many as their mesh has ranks, so that each maps one."""
    kinds: dict[object, list[Tensor]] = {}
    for index, param in enumerate(params):
        key: object = index
        if isinstance(param, DTensor) and param.ndim == 2:
            key = (param.shape, param.dtype, param.device_mesh, param.placements)
        kinds.setdefault(key, []).append(param)
    for some in kinds.values():
        ranks = some[0].device_mesh.size() if isinstance(some[0], DTensor) else 1
        yield from map(list, itertools.batched(some, ranks))
