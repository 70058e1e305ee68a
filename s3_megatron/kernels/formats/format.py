"""What a format of states is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from s3_megatron.kernels.call import Kind


class Format(ABC):
    """How states are stored, each in a tensor shaped like its weight, and read and written together.

    Attributes:
        name: by which an op and the compiled kernels know it.
        columns: the dtype of each kind of state, in the order of an optimizer's state names.
        computed: the precision that a step reads them in.
    """

    name: str
    columns: "Mapping[Kind, torch.dtype]"
    computed: torch.dtype = torch.float32

    def allocate(self, kind: "Kind", param: Tensor) -> Tensor:
        """Make the stored zeros of a parameter."""
        return torch.zeros_like(param, dtype=self.columns[kind], requires_grad=False)

    @abstractmethod
    def read_pair(self, m: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and r in the precision computed in; the stored tensors themselves where that is theirs."""

    @abstractmethod
    def write_pair(
        self, stored: tuple[Tensor, Tensor], m: Tensor, r: Tensor, *, moving: Tensor, seed: Tensor | None, first: int
    ) -> None:
        """Store new values (modifies ``stored`` in place).

        Args:
            stored: m and r.
            m: its new values, as ``read_pair`` returns them; as r's.
            moving: where to; elsewhere what is stored stays, bit for bit.
            seed: one int64 on the same device where rounding is to be stochastic, or None.
            first: number of the first element, so that each has noise of its own.
        """

    @abstractmethod
    def to_full(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """Return what a checkpoint holds, in a floating dtype: every format reads it, and this one without loss."""

    @abstractmethod
    def from_full(self, full: Sequence[Tensor]) -> list[Tensor]:
        """Return what is stored, of what a checkpoint holds in any floating dtype."""
