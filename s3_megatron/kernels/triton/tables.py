"""Which program of a launch works on which addresses: tables on the device, kept while the addresses stay."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s3_megatron.errors import S3Error

# One entry a bucket of parameters is the rule; gradients that move every step make one a step.
CAPACITY = 32
# Elements: a multiple of 16 bytes for any dtype of one byte or more.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: ``work`` has an int64 a program, row + 2^32 * block of the row."""

    work: Tensor
    aligned: bool


@dataclass(frozen=True, slots=True)
class Table:
    """The launches of one call; all tensors are parts of one buffer, and no tensor of the caller is kept alive."""

    launches: list[Launch]
    rows: Tensor
    copied: "torch.cuda.Event | None"
    stream: "torch.cuda.Stream | None"


class Tables:
    """The tables of the last ``CAPACITY`` calls, and those that a CUDA graph was captured with."""

    def __init__(self, block: int, columns: int) -> None:
        self._block = block
        self._columns = columns
        self._recent: OrderedDict[tuple[object, ...], Table] = OrderedDict()
        self._captured: dict[tuple[object, ...], Table] = {}

    def find(self, device: torch.device, item_sizes: Sequence[int], addresses: np.ndarray, sizes: np.ndarray) -> Table:
        """Return the table of a call.

        Args:
            device: of all tensors, which are contiguous.
            item_sizes: bytes an element of every column, 0 of one that is left out.
            addresses: int64 [column, row], 0 of a column that is left out.
            sizes: int64 [row], elements.
        """
        key = (device, *item_sizes, addresses.tobytes(), sizes.tobytes())
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        table = self._recent.get(key) or self._captured.get(key)
        if table is None:
            if capturing:
                raise S3Error("a CUDA graph captures a step on tensors never stepped before; run one step first")
            table = self._build(addresses, sizes, item_sizes, device)
        if capturing:
            # A replay reads this table for as long as the graph lives, and its end is not reported.
            self._captured[key] = table
        else:
            self._recent[key] = table
            self._recent.move_to_end(key)
            if len(self._recent) > CAPACITY:
                self._recent.popitem(last=False)
            _order(table)
        return table

    def _build(
        self, addresses: np.ndarray, sizes: np.ndarray, item_sizes: Sequence[int], device: torch.device
    ) -> Table:
        works, rows = plan(addresses, sizes, item_sizes, self._block, self._columns)
        buffer = torch.from_numpy(np.concatenate([*works, rows.reshape(-1)]))
        event = stream = None
        if device.type == "cuda":
            # From pinned memory, or the host would wait for the copy.
            buffer = buffer.pin_memory().to(device, non_blocking=True)
            stream = torch.cuda.current_stream(device)
            event = stream.record_event()
        parts = buffer.split([len(works[0]), len(works[1]), rows.size])
        launches = [Launch(part, aligned) for part, aligned in zip(parts, (True, False), strict=False) if part.numel()]
        return Table(launches, parts[2], event, stream)


def plan(
    addresses: np.ndarray, sizes: np.ndarray, item_sizes: Sequence[int], block: int, columns: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the work of the aligned and of the other launch, and the rows that both point to.

    The elements of an aligned row beyond the last multiple of ``ALIGNMENT`` become a row of the other launch: inside
    a vector all elements have to be there or none.
    """
    aligned = (addresses % 16 == 0).all(axis=0)
    body = np.where(aligned, sizes - sizes % ALIGNMENT, 0)
    shifted = addresses + body * np.array(item_sizes, np.int64)[:, None]
    parts = []
    for address, elements in ((addresses, body), (shifted, sizes - body)):
        part = np.zeros((len(sizes), columns), np.int64)
        part[:, : len(address)] = address.T
        part[:, -1] = elements
        parts.append(part[elements > 0])
    rows = np.concatenate(parts)

    blocks = -(-rows[:, -1] // block)
    row = np.repeat(np.arange(len(rows)), blocks)
    chunk = np.arange(len(row)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    work = row + (chunk << 32)
    split = int(blocks[: len(parts[0])].sum())
    return [work[:split], work[split:]], rows


def _order(table: Table) -> None:
    """Make the current stream wait for the table's copy, if another stream did it."""
    if table.stream is None or table.copied is None:
        return
    current = torch.cuda.current_stream(table.rows.device)
    if current != table.stream:
        current.wait_event(table.copied)
        table.rows.record_stream(current)
