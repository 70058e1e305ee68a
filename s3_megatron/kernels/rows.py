"""Where lists of tensors lie, for a kernel that loops over memory: looked at before the first write, each time."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import is_

import numpy as np
import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels import guards, metadata
from s3_megatron.kernels.call import GRADIENTS, ROLES, Columns
from s3_megatron.kernels.examine import examine, is_memory, same_lengths
from s3_megatron.kernels.metadata import Memory

# The kinds of tensors that are their memory, of those met so far; and the last calls whose tensors lay apart, by the
# addresses of their first weight and m, their number of rows and their columns' widths.
_plain: set[type] = {Tensor, torch.nn.Parameter}
_apart: dict[tuple[int, ...], "_Apart"] = {}
_KNOWN_AT_MOST = 64


class Unfit(S3Error):
    """A kernel that reads and writes memory cannot take a tensor; foreach may. Nothing has been written."""


@dataclass(slots=True)
class Rows:
    """The memory of a call: its columns, with contiguous copies of what is in no order of memory that a row shares.

    ``table`` is int64 [row, kinds + 1]: addresses, each kind's in the place it has in ``call.ROLES``, 0 of one that is
    left out; elements.
    """

    columns: Columns
    straight: Columns
    table: np.ndarray

    @property
    def addresses(self) -> np.ndarray:
        """int64 [kind, row], in the order of ``call.ROLES``."""
        return self.table[:, :-1].T

    @property
    def sizes(self) -> np.ndarray:
        """int64 [row], elements."""
        return self.table[:, -1]

    def put_back(self) -> None:
        """Copy what a kernel wrote to the copies (modifies all that a step writes)."""
        used = self.straight.lists
        for kind, originals in self.columns.written().items():
            if used[kind] is not originals:
                torch._foreach_copy_(list(originals), list(used[kind]))


@dataclass(slots=True)
class _Apart:
    """A call whose written tensors share no memory with each other nor with gradients, in numbers alone."""

    table: np.ndarray
    # Of what is written, as _meets_written takes it.
    starts: np.ndarray
    ends: np.ndarray

    def holds(self, table: np.ndarray, width: int) -> bool:
        """Whether a call is this one but for the places of gradients, and these are apart as well (and kept)."""
        differs = table != self.table
        moved = differs[:, GRADIENTS].copy()
        differs[:, GRADIENTS] = False
        if differs.any():
            return False
        if moved.any():
            begins, lengths = table[moved, GRADIENTS], table[moved, -1] * width
            if ((lengths > 0) & _meets_written(begins, lengths, self.starts, self.ends)).any():
                return False
            self.table = table
        return True


def read(columns: Columns) -> Memory | None:
    """Return where rows lie if they are in every point as a kernel wants them, but that they may share memory."""
    return metadata.read([*columns.lists.values()], _plain)


def lay_out(columns: Columns, takes: Container[torch.dtype], memory: Memory | None = None) -> Rows:
    """Return where the tensors of a call lie, once it is sure that a kernel for these dtypes touches no other place.

    Every step looks at all that can change from one to the next: types, dtypes, devices, shapes, strides, bits,
    addresses and storages, in one call (``metadata``). Whether tensors share memory is found out where an address is
    new; for what is not as a kernel wants it, tensors are looked at one by one, and copied.

    Args:
        columns: at least one row.
        takes: the kernel's dtypes.
        memory: what ``read`` returned of these columns just now.

    Raises:
        Unfit: a tensor whose memory is not its value (a wrapper, a negative bit, no storage), or that is not in the
            dtype and place of its column; two that share memory.
        S3Error: as ``examine``.
    """
    same_lengths(columns)
    # Inside vmap, grad and functionalize a Tensor is a wrapper that its type does not show.
    if torch._C._functorch.maybe_current_level() is not None:
        raise Unfit("a transform of torch.func runs")
    dtypes = columns.dtypes()
    if all(dtype in takes for dtype in dtypes) and columns.stored() is not None:
        memory = memory or read(columns)
        table = memory.table if memory is not None else _known_otherwise(columns)
        if table is not None:
            table = _in_places(columns, table)
            _keep_apart(columns, table)
            return Rows(columns, columns, table)
    every = list(chain.from_iterable(columns.lists.values()))
    if not _plain.issuperset(map(type, every)):
        _meet(set(map(type, every)))
    for dtype, column in zip(dtypes, columns.lists.values(), strict=True):
        found = {x.dtype for x in column}
        if len(found) > 1 or dtype not in takes:
            raise Unfit(f"it takes tensors of one dtype a kind, and not {', '.join(sorted(map(str, found)))}")
    if columns.stored() is None:
        raise Unfit("m and r are stored otherwise")
    try:
        return _look_closely(columns, every)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # sparse, or without a storage
        raise Unfit(str(error).split("\n")[0]) from None


def sort(columns: Columns) -> list[Columns]:
    """Return the rows sorted apart by device, dtypes and whether they are memory, in their order (no copies)."""
    parts: dict[object, list[tuple[Tensor, ...]]] = {}
    for row in columns.rows():
        key = (row[0].device, tuple(x.dtype for x in row), all(is_memory(type(x)) for x in row))
        parts.setdefault(key, []).append(row)
    return [columns.of(part) for part in parts.values()]


def _known_otherwise(columns: Columns) -> np.ndarray | None:
    if metadata.available() or not _plain.issuperset(map(type, (columns["weight"][0], columns["m"][0]))):
        return None
    return guards.read([*columns.lists.values()])


def _look_closely(columns: Columns, every: list[Tensor]) -> Rows:
    """Look at tensors one by one; copy those that are in no order of memory that their row shares."""
    straight = columns
    if not all(map(Tensor.is_contiguous, every)) or any(map(Tensor.is_neg, columns["gradient"])):
        straight = _straight(columns)
    numbers = list(map(Tensor.numel, every))
    if len({*map(Tensor.get_device, every)}) > 1 or numbers != numbers[: len(columns)] * len(columns.lists):
        raise Unfit("the tensors of a row differ in size or place")
    lists = [*straight.lists.values()]
    table = guards.table_of(lists)
    if ((table[:, : len(lists)].T == 0) & (table[:, -1] > 0)).any():
        raise Unfit("a tensor has no memory")
    examine(columns)
    if any(any(map(Tensor.is_neg, column)) for column in straight.written().values()):
        raise Unfit("a tensor has the negative bit")
    table = _in_places(columns, table)
    if straight is columns:
        _keep_apart(columns, table)
        guards.keep(lists)
    else:  # of copies the addresses are new each time
        _find_apart(table, straight.item_sizes())
    return Rows(columns, straight, table)


def _in_places(columns: Columns, table: np.ndarray) -> np.ndarray:
    """Return a table of one kind after another with each where ``ROLES`` has it, 0 in the place of a missing one."""
    places = [i for i, kind in enumerate(ROLES) if kind in columns.lists]
    if places[-1] == len(places) - 1:  # none is missing in between
        return table
    spread = np.zeros_like(table)
    spread[:, [*places, -1]] = table[:, [*range(len(places)), -1]]
    return spread


def _straight(columns: Columns) -> Columns:
    """Return columns with copies of gradients that have the negative bit, and of what is in no order its row shares."""
    grads = [x.resolve_neg() for x in columns["gradient"]]
    rows = list(replace(columns, lists=columns.lists | {"gradient": grads}).rows())
    used = columns.of([row if _in_one_order(row) else [x.contiguous() for x in row] for row in rows]).lists
    kept = {kind: column for kind, column in columns.lists.items() if all(map(is_, column, used[kind]))}
    return replace(columns, lists=used | kept)


def _in_one_order(row: Sequence[Tensor]) -> bool:
    """Whether the tensors of a row fill one block of memory each, all in one order of dimensions."""
    orders = [[(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1] for x in row]
    reach = 1
    for stride, size in sorted(orders[0]):
        if stride != reach:
            return False
        reach *= size
    return orders.count(orders[0]) == len(orders)


def _keep_apart(columns: Columns, table: np.ndarray) -> None:
    """Raise Unfit where tensors share memory that may not, unless it is known that these do not."""
    widths = columns.item_sizes()
    key = (int(table[0, 0]), int(table[0, 2]), len(table), *widths)
    known = _apart.get(key)
    if known is not None and known.holds(table, widths[GRADIENTS]):
        return
    if len(_apart) >= _KNOWN_AT_MOST:
        _apart.clear()
    _apart[key] = _find_apart(table, widths)


def _find_apart(table: np.ndarray, widths: list[int]) -> _Apart:
    """Raise Unfit where a written tensor shares memory with another tensor of the call."""
    some = table[table[:, -1] > 0]
    begins, lengths = some[:, : len(widths)].T, some[:, -1] * np.array(widths)[:, None]
    written, their_lengths = (np.delete(each, GRADIENTS, axis=0).ravel() for each in (begins, lengths))
    order = np.argsort(written)
    starts, ends = written[order], (written + their_lengths)[order]
    if (ends[:-1] > starts[1:]).any():
        raise Unfit("two tensors share memory")
    starts = np.append(starts, np.iinfo(np.int64).max)
    if _meets_written(begins[GRADIENTS], lengths[GRADIENTS], starts, ends).any():
        raise Unfit("a gradient shares memory with what is written")
    return _Apart(table, starts, ends)


def _meets_written(begins: np.ndarray, lengths: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether each range of bytes meets one of those that are written, which rise; ``starts`` has one beyond all.

    The first written one that ends behind a range's beginning must begin behind its end.
    """
    return starts[np.searchsorted(ends, begins, side="right")] < begins + lengths


def _meet(kinds: set[type]) -> None:
    for kind in kinds:
        if not is_memory(kind):
            raise Unfit(f"{kind.__name__} is no plain tensor: its value is not its memory")
        _plain.add(kind)
