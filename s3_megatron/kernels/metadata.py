"""What torch's tensors are and where they lie, of whole lists in one call: the C++ library reads it off the objects.

It goes by torch's C functions for compiled models (``aoti_torch_get_data_ptr`` and its like, a stable interface) and
two of its C++ functions. They take the address of a tensor in memory, which lies at one place in every Python object of
a tensor: where, is found out once, and every function is tried against what Python's tensors say. Nothing of it is kept
between two calls, and no tensor.
"""

import ctypes
import functools
import logging
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from s3_megatron.kernels.call import GRADIENTS, ROLES

logger = logging.getLogger(__name__)

_GETTERS = (
    *("data_ptr", "storage_size", "storage_offset", "dim", "sizes", "strides", "dtype", "device_type", "device_index"),
    "layout",
)
# at::native::is_neg and torch::autograd::impl::bump_version, both of a const at::Tensor&.
_IS_NEG = "_ZN2at6native6is_negERKNS_6TensorE"
_BUMP_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
_WORD = 8


class _Torch(ctypes.Structure):
    """``S3Torch`` of metadata.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_GETTERS, "is_neg", "bump_version")),
        ("type_at", ctypes.c_int64),
        ("tensor_at", ctypes.c_int64),
        ("strided", ctypes.c_int32),
        ("dtypes", ctypes.c_int32 * 3),
    ]


@dataclass(slots=True)
class Memory:
    """Rows of tensors that are memory, as a kernel wants it: plain, without gaps, in one order a row, on one device.

    Args:
        objects: the tensors, column after column.
        table: int64 [row, kinds + 1]: addresses, one column after another and then 0; elements.
    """

    objects: np.ndarray
    table: np.ndarray
    _reader: "_Reader"

    def count_up_versions(self) -> bool:
        """Let autograd know that all but the gradients have been written; returns whether torch could."""
        rows = len(self.table)
        count_up, torch_ = self._reader.library.s3_count_up, self._reader.torch
        return bool(count_up(torch_, _address(self.objects), rows, len(self.objects) // rows))


@dataclass(frozen=True)
class _Reader:
    library: ctypes.PyDLL
    torch: _Torch

    def read(self, columns: Sequence[Sequence[Tensor]], kinds: Iterable[type]) -> Memory | None:
        count = len(columns[0])
        objects = np.fromiter(chain.from_iterable(columns), object, count * len(columns))
        types = np.fromiter(map(id, kinds), np.int64)
        table = np.empty((count, len(ROLES) + 1), np.int64)
        fits = self.library.s3_read(
            *(self.torch, _address(objects), count, len(columns)),
            *(_address(types), len(types), _address(table)),
        )
        return Memory(objects, table, self) if fits else None


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])  # .ctypes takes three times as long


def read(columns: Sequence[Sequence[Tensor]], kinds: Iterable[type]) -> Memory | None:
    """Return where rows of tensors lie; None if any is not what a kernel takes as memory, or here nothing can be read.

    All that ``examine`` looks for is looked for, each time, but for tensors that share memory.

    Args:
        columns: lists in the order of ``call.ROLES``, of which r and model weights may be left out: one length, >= 1.
        kinds: classes whose tensors are their memory.
    """
    reader = _reader()
    return None if reader is None else reader.read(columns, kinds)


def available() -> bool:
    """Whether tensors can be read here: the library has been compiled, and torch and Python are such as it knows."""
    return _reader() is not None


def _reader() -> _Reader | None:
    from s3_megatron.kernels.cpu import library  # which imports rows, which imports this

    found = library.at_hand()
    return None if found is None else _tried(found, tuple(library.TYPES))


@functools.cache
def _tried(found: ctypes.CDLL, dtypes: tuple[torch.dtype, ...]) -> _Reader | None:
    """Return what reads here, once it has been tried; None where torch or Python is another."""
    wrong: str | None = "Python is not CPython with its lock"
    if sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
        try:
            # Real tensors of the CPU, whatever mode the first step runs in.
            with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False):
                reader = _Reader(_held(found), _functions(dtypes))
                wrong = _trial(reader)
        except (OSError, AttributeError, ValueError) as error:
            wrong = str(error)
        if wrong is None:
            return reader
    logger.info("S3 looks at tensors one by one: %s", wrong)
    return None


def _held(found: ctypes.CDLL) -> ctypes.PyDLL:
    """The library, called without giving up Python's lock: no thread changes a tensor meanwhile."""
    held = ctypes.PyDLL(found._name)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    held.s3_read.argtypes = [ctypes.POINTER(_Torch), pointer, count, count, pointer, count, pointer]
    held.s3_count_up.argtypes = [ctypes.POINTER(_Torch), pointer, count, count]
    return held


def _functions(dtypes: Iterable[torch.dtype]) -> _Torch:
    # By Python's part of torch, which brings the others: their files have other names elsewhere.
    found = ctypes.CDLL(torch._C.__file__)

    def number(name: str) -> int:
        return int(getattr(found, f"aoti_torch_{name}")())

    names = {name: f"aoti_torch_get_{name}" for name in _GETTERS} | {"is_neg": _IS_NEG, "bump_version": _BUMP_VERSION}
    functions = {name: ctypes.cast(getattr(found, symbol), ctypes.c_void_p) for name, symbol in names.items()}
    x = torch.zeros(1)
    words = np.frombuffer(ctypes.string_at(id(x), Tensor.__basicsize__ // _WORD * _WORD), np.int64)
    return _Torch(
        **functions,
        type_at=_WORD * words.tolist().index(id(type(x))),
        tensor_at=_WORD * words.tolist().index(x._cdata),
        strided=number("layout_strided"),
        dtypes=tuple(number(f"dtype_{str(dtype).removeprefix('torch.')}") for dtype in dtypes),
    )


def _trial(reader: _Reader) -> str | None:
    """Return what reads otherwise than Python does, if anything."""
    base = torch.zeros(3, 4, 5)
    weights = [base[1], base[2].mT, torch.nn.Parameter(base[0]), base[0, 0, 0]]
    columns = [
        weights,
        *([torch.zeros_like(x, dtype=dtype) for x in weights] for dtype in (torch.float16, *[torch.bfloat16] * 2)),
    ]
    kinds = (Tensor, torch.nn.Parameter)
    found = reader.read(columns, kinds)
    expected = [[*(x.data_ptr() for x in row), 0, row[0].numel()] for row in zip(*columns, strict=True)]
    if found is None or found.table.tolist() != expected:
        return f"of tensors at {expected} it reads {None if found is None else found.table.tolist()}"
    versions = [[x._version for x in column] for column in columns]
    if not found.count_up_versions():
        return "versions cannot be counted"
    for kind, (column, before) in enumerate(zip(columns, versions, strict=True)):
        # Views count with their base.
        if (kind == GRADIENTS) != ([x._version for x in column] == before):
            return f"versions of column {kind} were {before} and are {[x._version for x in column]}"
    short = torch.zeros(4)
    short.untyped_storage().resize_(12)
    others = {
        "a negative bit": torch._neg_view(torch.zeros(4)),
        "gaps": torch.zeros(8)[::2],
        "a short storage": short,
        "another size": torch.zeros(5),
        "another dtype": torch.zeros(4, dtype=torch.float64),
        "no layout": torch.zeros(4).to_sparse(),
        "another device": torch.zeros(4, device="meta"),
        "another class": torch.nn.Buffer(torch.zeros(4)).as_subclass(_Other),
    }
    for name, x in others.items():
        for at in range(4):
            row = [[torch.zeros(4)] for _ in range(4)]
            row[at] = [x]
            if reader.read(row, kinds) is not None:
                return f"{name} of a tensor is not seen"
    return None


class _Other(Tensor):
    """Of a class that is not among those asked for."""
