"""Lists of tensors known from an earlier call, where ``metadata`` can read nothing: as torch's compiler knows them."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s3_megatron.kernels.call import ROLES

try:
    # Type, dispatch keys, dtype, device, shape and strides of a whole list in one call (torch 2.8 and 2.13). It is
    # private: where it is another, it raises here, and every step looks at every tensor by itself.
    from torch._C._dynamo.guards import TensorGuards

    TensorGuards(*[torch.zeros(1)], dynamic_dims_sizes=None, dynamic_dims_strides=None)
except (ImportError, TypeError):
    TensorGuards = None  # type: ignore[assignment,misc]

type Lists = Sequence[Sequence[Tensor]]  # in the order of ROLES

# By the addresses of the first weight and m and the number of tensors; no tensor is kept alive.
_known: dict[tuple[int, ...], Any] = {}
_KNOWN_AT_MOST = 64


def keep(columns: Lists) -> None:
    """Remember a call whose tensors all passed every look, and are their memory without copies."""
    if TensorGuards is None:
        return
    if len(_known) >= _KNOWN_AT_MOST:
        _known.clear()
    every = list(chain.from_iterable(columns))
    _known[_name(columns)] = TensorGuards(*every, dynamic_dims_sizes=None, dynamic_dims_strides=None)


def read(columns: Lists) -> np.ndarray | None:
    """Return the table of a call (``metadata.Memory``) that is as one kept in all but addresses and storages.

    None if there is none, or a tensor has no memory or exceeds its storage.
    """
    try:
        guards = _known.get(_name(columns))
        if guards is None or not guards.check(*chain.from_iterable(columns)):
            return None
        table = table_of(columns)
        rooms = np.array([[_room(x) for x in column] for column in columns])
    except RuntimeError:  # without a storage
        return None
    sizes = table[:, -1]
    fits = ((table[:, : len(columns)].T != 0) & (rooms >= sizes)) | (sizes == 0)
    return table if fits.all() else None


def table_of(columns: Lists) -> np.ndarray:
    """Return the table of a call, looked up one by one."""
    table = np.zeros((len(columns[0]), len(ROLES) + 1), np.int64)
    for kind, column in enumerate(columns):
        table[:, kind] = np.fromiter(map(Tensor.data_ptr, column), np.int64, len(column))
    table[:, -1] = list(map(Tensor.numel, columns[0]))
    return table


def _room(x: Tensor) -> int:
    """Elements from a tensor's first to its storage's end."""
    return int(x.untyped_storage().nbytes() // x.element_size() - x.storage_offset())


def _name(columns: Lists) -> tuple[int, ...]:
    return columns[0][0].data_ptr(), columns[2][0].data_ptr(), sum(map(len, columns))
