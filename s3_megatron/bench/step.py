"""The time of one optimizer step: contenders taking turns in one process, beside the machine's own bandwidth."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from s3_megatron.bench import host, timing
from s3_megatron.bench.about import about
from s3_megatron.bench.contenders import ADAMW, S3_BY_DEFAULT, Contender, contenders
from s3_megatron.bench.timing import WARM_UP, Times
from s3_megatron.errors import first_line
from s3_megatron.kernels.cpu import library

SHARDS = 1000
# Shards of a large model on a GPU, where a tensor of 30,000 weights takes no time beside its launch.
MANY, MANY_FROM = 10_000, 300_000_000
# Elements: Megatron's buffers begin every parameter at a multiple of it (DistributedOptimizer, megatron-core 0.19.2).
ALIGNMENT = 64
# Bytes a second that a core of a usual offload node gets, with all of them busy.
SLOW_CORE = 8e9


@dataclass(frozen=True)
class Row:
    """One contender on one size and layout; times in milliseconds, bandwidth in 10^9 bytes a second.

    ``ms`` is the whole step, as a trainer waits for it. On a GPU ``kernel_ms`` is what it is busy, ``graph_ms`` a
    replay of the step captured in a CUDA graph, and bandwidth that of ``kernel_ms``.
    """

    parameters: int
    tensors: int
    name: str
    ms: float
    bytes: int
    bandwidth: float
    share_of_stream: float
    ratio: float | None  # to fused AdamW in the same rounds; None where that did not run
    ms_at_slow_cores: float  # computed: the measured time, or what the bytes take at SLOW_CORE
    share_of_copy: float
    kernel_ms: float | None = None
    kernel_ratio: float | None = None  # to fused AdamW's, alike
    graph_ms: float | None = None


@dataclass(frozen=True)
class Result:
    """All rows of a run, and what it ran on."""

    machine: dict[str, Any]
    stream: float  # 10^9 bytes a second, of a loop that works in place
    copy: float  # 10^9 bytes a second, read and written, of a copy
    rows: list[Row]
    host: list[host.Host]
    missing: list[str]


def measure(
    device: str,
    sizes: list[int],
    threads: int,
    repeats: int,
    on_progress: Callable[[str], None] = lambda text: None,
    on_rows: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Time a step of every contender at every size, as one tensor and as a thousand (and more) of odd sizes.

    A time is the median of ``repeats`` rounds after three; in a round each contender takes one step, so that what
    slows the machine slows all. ``on_rows`` gets what there is whenever there is more.
    """
    torch.set_num_threads(threads)
    found, missing = contenders(device)
    stream, copy = ceilings(device, repeats)
    result = Result(_machine(device, threads, repeats), stream / 1e9, copy / 1e9, [], [], missing)
    for size in sizes:
        for tensors in (1, SHARDS, *((MANY,) if device != "cpu" and size >= MANY_FROM else ())):
            on_progress(f"{size:,} parameters in {tensors:,} tensors")
            params = _parameters(size, tensors, device)
            entrants = [one for one in found if size <= one.largest and tensors <= one.most]
            times, graphs = _times(entrants, params, device, repeats, missing)
            for one in entrants:
                if one.name in times:
                    adamw = times.get(ADAMW)
                    row = _row(one, size, tensors, times[one.name], adamw, result, threads, graphs.get(one.name))
                    result.rows.append(row)
            on_rows(result)
            del params  # before the next ones
    on_progress("host time")
    compared = [contender for contender in found if contender.name in (S3_BY_DEFAULT, ADAMW)]
    result.host.extend(host.measure(compared, device, repeats))
    on_rows(result)
    return result


def _row(
    contender: Contender,
    size: int,
    tensors: int,
    times: Times,
    adamw: Times | None,
    result: Result,
    threads: int,
    graph: float | None = None,
) -> Row:
    moved = contender.bytes * size
    busy = times.whole if times.kernels is None else times.kernels
    bandwidth = moved / busy / 1e9
    return Row(
        parameters=size,
        tensors=tensors,
        name=contender.name,
        ms=times.whole * 1e3,
        bytes=contender.bytes,
        bandwidth=bandwidth,
        share_of_stream=bandwidth / result.stream,
        ratio=None if adamw is None else times.whole / adamw.whole,
        ms_at_slow_cores=max(times.whole, moved / (SLOW_CORE * threads)) * 1e3,
        share_of_copy=bandwidth / result.copy,
        kernel_ms=None if times.kernels is None else times.kernels * 1e3,
        kernel_ratio=None if not (times.kernels and adamw and adamw.kernels) else times.kernels / adamw.kernels,
        graph_ms=None if graph is None else graph * 1e3,
    )


def _times(
    entrants: list[Contender], params: list[torch.nn.Parameter], device: str, repeats: int, missing: list[str]
) -> tuple[dict[str, Times], dict[str, float]]:
    """Time the contenders in turns, and graphs of those that can be captured; failures go into ``missing``."""
    racing = {}
    for contender in entrants:
        try:
            optimizer = contender.make(params)
            optimizer.step()  # allocates its state, and compiles
        except Exception as error:  # of memory, or of a kernel that does not fit this GPU; a rival may raise anything
            if contender.name.startswith("S3") and not isinstance(error, RuntimeError):
                raise
            missing.append(f"{contender.name}, {len(params):,} tensors: {first_line(error)}")
        else:
            racing[contender.name] = optimizer
    times: dict[str, list[Times]] = {name: [] for name in racing}
    for _ in range(WARM_UP + repeats):
        for name, optimizer in racing.items():
            times[name].append(timing.once(optimizer.step, device))
    del racing
    graphs = {
        one.name: timing.replayed(one.make(params, **one.capturable).step, device, repeats)
        for one in entrants
        if one.name in times and one.capturable is not None and device != "cpu"
    }
    return {name: timing.median(taken[WARM_UP:]) for name, taken in times.items()}, graphs


def _parameters(size: int, tensors: int, device: str) -> list[torch.nn.Parameter]:
    """Cut one flat buffer of weights and one of gradients into tensors of odd sizes, as Megatron cuts a rank's shard.

    Every tensor begins at a multiple of ``ALIGNMENT`` elements.
    """
    shares = torch.rand(tensors, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    ends = (shares.cumsum(0) / shares.sum() * (size - tensors)).long() + torch.arange(1, tensors + 1)
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    padded = [-(-length // ALIGNMENT) * ALIGNMENT for length in lengths]
    torch.manual_seed(0)
    weights, grads = (torch.randn(sum(padded), device=device) for _ in range(2))
    grads *= 1e-3
    params = []
    for length, weight, grad in zip(lengths, weights.split(padded), grads.split(padded), strict=True):
        params.append(torch.nn.Parameter(weight[:length]))
        params[-1].grad = grad[:length]
    return params


def ceilings(device: str, repeats: int) -> tuple[float, float]:
    """Measure what the memory gives loops that do nothing else: bytes a second of a <- a + 3 b, and of a copy.

    The first is in place as a step is: on a CPU a loop that writes what it has not read moves more than it seems to.
    """
    a, b = (torch.randn(60_000_000 if device == "cpu" else 500_000_000, device=device) for _ in range(2))
    size = a.element_size() * a.numel()
    added = timing.steady(lambda: a.add_(b, alpha=3.0), device, repeats)
    copied = timing.steady(lambda: a.copy_(b), device, repeats)
    return 3 * size / added, 2 * size / copied


def _machine(device: str, threads: int, repeats: int) -> dict[str, Any]:
    kernel = "Triton" if device == "cuda" else library.loops()[0]
    made = about(device, "triton", "deepspeed", "transformer-engine")
    return {**made, "kernel": kernel, "threads": threads, "repeats": repeats}


def as_json(result: Result, command: str) -> dict[str, Any]:
    """Return a result as it is stored: the command first, then everything measured."""
    return {"command": command, **asdict(result)}


_CAPTIONS = {
    "cpu": "ms slow: computed, at 8 GB/s a core",
    "cuda": "ms: the whole step; kernel ms: the GPU alone, of which GB/s are; graph ms: a captured step, replayed",
}


def _cells(row: Row, device: str) -> dict[str, str]:
    """What is shown of a row, by the column's heading."""
    common = {"ms": f"{row.ms:.2f}", "x AdamW": _text(row.ratio), "bytes": f"{row.bytes}"}
    if device == "cpu":
        slow = {"stream": f"{row.share_of_stream:.0%}", "ms slow": f"{row.ms_at_slow_cores:.2f}"}
        return {**common, "GB/s": f"{row.bandwidth:.1f}", **slow}
    return {
        **common,
        "kernel ms": _text(row.kernel_ms),
        "kernel x": _text(row.kernel_ratio),
        "GB/s": f"{row.bandwidth:.0f}",
        "copy": f"{row.share_of_copy:.0%}",
        "graph ms": _text(row.graph_ms),
    }


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def tables(result: Result) -> Iterator[Table]:
    """Lay out the rows, one table a size and layout."""
    for size, tensors in dict.fromkeys((row.parameters, row.tensors) for row in result.rows):
        table = Table(
            title=f"{size:,} parameters, {tensors:,} tensor{'s' * (tensors > 1)}",
            title_justify="left",
            caption=_CAPTIONS[result.machine["device"]],
            caption_justify="left",
            box=None,
        )
        table.add_column("", no_wrap=True)
        rows = [row for row in result.rows if (row.parameters, row.tensors) == (size, tensors)]
        cells = [_cells(row, result.machine["device"]) for row in rows]
        for heading in cells[0]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row, cell in zip(rows, cells, strict=True):
            table.add_row(row.name, *cell.values())
        yield table
    table = Table(title="host time of a step, tensors of one element", title_justify="left", box=None)
    table.add_column("tensors", justify="right")
    for name in (S3_BY_DEFAULT, ADAMW):
        table.add_column(f"{name}: ms", justify="right", no_wrap=True)
    for tensors in host.TENSORS:
        ms = {row.name: row.ms for row in result.host if row.tensors == tensors}
        table.add_row(f"{tensors:,}", *(f"{ms[name]:.3f}" for name in (S3_BY_DEFAULT, ADAMW)))
    yield table
