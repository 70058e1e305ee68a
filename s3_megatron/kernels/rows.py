"""What a kernel may touch: lists of tensors are examined before the first write, and their memory laid out for loops.

A row is one parameter's tensors; a column is a kind of them: weights, gradients, m, r and, at times, model weights.
"""

import functools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels import formats

try:
    # Type, dispatch keys, dtype, device, shape and strides of a whole list in one call (torch 2.8 and 2.13). It is
    # private: where it is another, it raises here, and every step looks at every tensor by itself.
    from torch._C._dynamo.guards import TensorGuards

    TensorGuards(*[torch.zeros(1)], dynamic_dims_sizes=None, dynamic_dims_strides=None)
except (ImportError, TypeError):
    TensorGuards = None  # type: ignore[assignment,misc]

type Columns = list[Sequence[Tensor]]

NAMES = ("weight", "gradient", "m", "r", "model weight")
GRADIENTS = 1

# The kinds of tensors that are their memory, of those met so far; and the last calls that passed every look, by the
# addresses of their first weight and m and their number of tensors.
_plain: set[type] = {Tensor, torch.nn.Parameter}
_known: dict[tuple[int, ...], "_Known"] = {}
_KNOWN_AT_MOST = 64


class Unfit(S3Error):
    """A kernel that reads and writes memory cannot take a tensor; foreach may. Nothing has been written."""


@dataclass(slots=True)
class Rows:
    """The memory of a call: its columns, with contiguous copies of what is not; int64 addresses [column, row] of all,
    and int64 elements [row]."""

    columns: Columns
    straight: Columns
    addresses: np.ndarray
    sizes: np.ndarray

    def put_back(self) -> None:
        """Copy what a kernel wrote to the copies (modifies weights, states and model weights)."""
        for index, (originals, used) in enumerate(zip(self.columns, self.straight, strict=True)):
            if used is not originals and index != GRADIENTS:
                torch._foreach_copy_(list(originals), list(used))


@dataclass(slots=True)
class _Known:
    """A call that passed every look, in numbers alone: no tensor is kept alive."""

    metadata: Any  # TensorGuards
    addresses: np.ndarray
    sizes: np.ndarray
    # Of what is written, as _meets_written takes it.
    starts: np.ndarray
    ends: np.ndarray

    def fits(self, columns: Columns, every: list[Tensor]) -> bool:
        """Whether a call is this one but for the places of gradients, and these are looked at (and kept)."""
        if not self.metadata.check(*every):
            return False
        addresses = _addresses(columns)
        differ = addresses != self.addresses
        moved = np.flatnonzero(differ[GRADIENTS]).tolist()
        differ[GRADIENTS] = False
        if differ.any():
            return False
        if not moved:
            return True
        grads, begins = [columns[GRADIENTS][row] for row in moved], addresses[GRADIENTS, moved]
        width = columns[GRADIENTS][0].element_size()
        needed = self.sizes[moved] * width
        room = np.array([x.untyped_storage().nbytes() - x.storage_offset() * width for x in grads])
        meets = _meets_written(begins, needed, self.starts, self.ends)
        if ((needed > 0) & ((begins == 0) | (room < needed) | meets)).any():
            return False
        self.addresses = addresses
        return True


def examine(columns: Columns) -> None:
    """Raise if the lists do not belong together, or a tensor cannot be written; reads no value.

    Raises:
        S3Error: lists of several lengths; a row of several shapes or devices; sparse, complex, integer tensors; states
            of two dtypes; tensors longer than their storage; written ones with several elements in one place.
    """
    _same_lengths(columns)
    for row in zip(*columns, strict=True):
        weight = row[0]
        for name, x in zip(NAMES, row, strict=False):
            if x.layout is not torch.strided:
                raise S3Error(
                    f"S3 takes dense tensors, and a {name} of shape {list(x.shape)} is {x.layout}: build the embedding "
                    "with sparse=False"
                )
            if x.shape != weight.shape:
                raise S3Error(
                    f"a weight of shape {list(weight.shape)} has a {name} of shape {list(x.shape)}: they must be equal"
                )
            if x.device != weight.device:
                raise S3Error(f"a weight on {weight.device} has a {name} on {x.device}: they must be on one device")
            if not x.is_floating_point():
                raise S3Error(f"S3 takes real floating-point tensors, and a {name} is {x.dtype}")
            if _exceeds_its_storage(x):
                raise S3Error(f"a {name} of shape {list(x.shape)} is longer than its storage, which was resized")
            if x is not row[GRADIENTS] and _meets_itself(x):
                raise S3Error(
                    f"a {name} of shape {list(x.shape)} and strides {list(x.stride())} has several elements in one "
                    "place in memory and cannot be written: clone() it"
                )
        if row[2].dtype != row[3].dtype or row[2].dtype not in formats.FORMATS:
            raise S3Error(
                f"m is {row[2].dtype} and r is {row[3].dtype}: they must have one dtype, float32, bfloat16 or float64"
            )


def lay_out(columns: Columns, takes: Container[torch.dtype]) -> Rows:
    """Return where the tensors of a call lie, once it is sure that a kernel for these dtypes touches no other place.

    Every step looks at all that can change from one to the next: types, dtypes, devices, shapes, strides and bits in
    one call of torch's, addresses in one array. Anything new there, but for gradients that moved, is looked at in full.

    Raises:
        Unfit: a tensor whose memory is not its value (a wrapper, a negative bit, no storage), or that is not in the
            dtype and place of its column; two that share memory.
        S3Error: as ``examine``.
    """
    _same_lengths(columns)
    # Inside vmap, grad and functionalize a Tensor is a wrapper that its type does not show.
    if torch._C._functorch.maybe_current_level() is not None:
        raise Unfit("a transform of torch.func runs")
    every = list(chain.from_iterable(columns))
    first = columns[0][0], columns[2][0]
    if _plain.issuperset(map(type, first)):
        known = _known.get((*map(_address, first), len(every)))
        if known and all(column[0].dtype in takes for column in columns) and known.fits(columns, every):
            return Rows(columns, columns, known.addresses, known.sizes)
    if not _plain.issuperset(map(type, every)):
        _meet(set(map(type, every)))
    dtypes = [column[0].dtype for column in columns]
    for dtype, column in zip(dtypes, columns, strict=True):
        found = {x.dtype for x in column}
        if len(found) > 1 or dtype not in takes:
            raise Unfit(f"it takes tensors of one dtype a kind, and not {', '.join(sorted(map(str, found)))}")
    if dtypes[2] != dtypes[3] or dtypes[2] not in formats.FORMATS:
        raise Unfit("m and r are stored otherwise")
    try:
        return _lay_out(columns, every)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # sparse, or without a storage
        raise Unfit(str(error).split("\n")[0]) from None


def sort(columns: Columns) -> list[Columns]:
    """Return the rows sorted apart by device, dtypes and whether they are memory, in their order (no copies)."""
    parts: dict[object, Columns] = {}
    for row in zip(*columns, strict=True):
        key = (row[0].device, tuple(x.dtype for x in row), all(_is_memory(type(x)) for x in row))  # type: ignore[arg-type]
        for column, x in zip(parts.setdefault(key, [[] for _ in columns]), row, strict=True):
            column.append(x)  # type: ignore[attr-defined]
    return list(parts.values())


def _lay_out(columns: Columns, every: list[Tensor]) -> Rows:
    # Unbound methods over all columns at once: a thousand small shards take longer to list than to move.
    count = len(columns[0])
    straight = columns
    if not all(map(Tensor.is_contiguous, every)) or any(map(Tensor.is_neg, columns[GRADIENTS])):
        straight = [_straight(column, resolve=index == GRADIENTS) for index, column in enumerate(columns)]
    numbers = list(map(Tensor.numel, every))
    if len({*map(Tensor.get_device, every)}) > 1 or numbers != numbers[:count] * len(columns):
        raise Unfit("the tensors of a row differ in size or place")
    sizes, addresses = np.array(numbers[:count]), _addresses(straight)
    if ((addresses == 0) & (sizes > 0)).any():
        raise Unfit("a tensor has no memory")
    starts, ends = _look_closely(columns, straight, addresses, sizes)
    # Of copies the addresses tell nothing of what they are copied from, and to.
    if straight is columns and TensorGuards is not None:
        if len(_known) >= _KNOWN_AT_MOST:
            _known.clear()
        metadata = TensorGuards(*every, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        _known[int(addresses[0, 0]), int(addresses[2, 0]), len(every)] = _Known(
            metadata, addresses, sizes, starts, ends
        )
    return Rows(columns, straight, addresses, sizes)


def _addresses(columns: Columns) -> np.ndarray:
    count = len(columns) * len(columns[0])
    found = np.fromiter(map(Tensor.data_ptr, chain.from_iterable(columns)), np.int64, count)
    return found.reshape(len(columns), -1)


def _address(x: Tensor) -> int:
    """Return a tensor's address, -1 where it has none."""
    try:
        return x.data_ptr()
    except RuntimeError:
        return -1


def _straight(column: Sequence[Tensor], *, resolve: bool) -> Sequence[Tensor]:
    if resolve and any(map(Tensor.is_neg, column)):
        return [x.resolve_neg().contiguous() for x in column]
    return column if all(map(Tensor.is_contiguous, column)) else [x.contiguous() for x in column]


def _look_closely(
    columns: Columns, straight: Columns, addresses: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Raise where a tensor seen for the first time is not what it looks like; return what ``_meets_written`` takes."""
    examine(columns)
    if any(any(map(Tensor.is_neg, column)) for index, column in enumerate(straight) if index != GRADIENTS):
        raise Unfit("a tensor has the negative bit")
    some = sizes > 0
    widths = np.array([[column[0].element_size()] for column in straight])
    begins, lengths = addresses[:, some], sizes[some] * widths
    written, their_lengths = (np.delete(each, GRADIENTS, axis=0).ravel() for each in (begins, lengths))
    order = np.argsort(written)
    starts, ends = written[order], (written + their_lengths)[order]
    if (ends[:-1] > starts[1:]).any():
        raise Unfit("two tensors share memory")
    starts = np.append(starts, np.iinfo(np.int64).max)
    if _meets_written(begins[GRADIENTS], lengths[GRADIENTS], starts, ends).any():
        raise Unfit("a gradient shares memory with what is written")
    return starts, ends


def _meets_written(begins: np.ndarray, lengths: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether each range of bytes meets one of those that are written, which rise; ``starts`` has one beyond all.

    The first written one that ends behind a range's beginning must begin behind its end.
    """
    return starts[np.searchsorted(ends, begins, side="right")] < begins + lengths


def _same_lengths(columns: Columns) -> None:
    lengths = [len(column) for column in columns]
    if lengths.count(lengths[0]) != len(lengths):
        shown = ", ".join(f"{count} of kind {name}" for name, count in zip(NAMES, lengths, strict=False))
        raise S3Error(f"S3 takes lists of one length, and got {shown}")


def _meet(kinds: set[type]) -> None:
    for kind in kinds:
        if not _is_memory(kind):
            raise Unfit(f"{kind.__name__} is no plain tensor: its value is not its memory")
        _plain.add(kind)


@functools.cache
def _is_memory(kind: type[Tensor]) -> bool:
    """Whether tensors of this class are their memory: no class of its own decides what an operation does."""
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    usual = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and function in usual


def _exceeds_its_storage(x: Tensor) -> bool:
    if not x.numel() or x.is_meta or not _is_memory(type(x)) or torch._C._functorch.maybe_current_level() is not None:
        return False
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() > x.untyped_storage().nbytes()


def _meets_itself(x: Tensor) -> bool:
    """Whether two elements of a tensor are one in memory."""
    if x.is_contiguous() or x.numel() < 2:
        return False
    # By rising stride, each must step over all that the smaller ones reach.
    reach = 1
    dims = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    for stride, size in dims:
        if stride < reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    if dims[0][0] == 0:
        return True
    places = torch.zeros((), dtype=torch.int64)
    for stride, size in dims:
        places = places[..., None] + torch.arange(size) * stride
    return places.unique().numel() < x.numel()
