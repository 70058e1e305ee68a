"""The time of one optimizer step: contenders taking turns in one process, beside the machine's own bandwidth."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from typing import Any

import torch
from rich.table import Table

from s3_megatron import machine
from s3_megatron.bench import host
from s3_megatron.bench.contenders import ADAMW, Contender, contenders
from s3_megatron.kernels.cpu import library

SHARDS = 1000
S3 = "S3 p=3"
WARM_UP = 3
# Bytes a second that a core of a usual offload node gets, with all of them busy.
SLOW_CORE = 8e9


@dataclass(frozen=True)
class Row:
    """One contender on one size and layout; times in milliseconds, bandwidth in 10^9 bytes a second."""

    parameters: int
    tensors: int
    name: str
    ms: float
    bytes: int
    bandwidth: float
    share_of_stream: float
    ratio: float  # to fused AdamW in the same rounds
    ms_at_slow_cores: float  # computed: the measured time, or what the bytes take at SLOW_CORE


@dataclass(frozen=True)
class Result:
    """All rows of a run, and what it ran on."""

    machine: dict[str, Any]
    stream: float  # 10^9 bytes a second
    rows: list[Row]
    host: list[host.Host]
    missing: list[str]


def measure(
    device: str, sizes: list[int], threads: int, repeats: int, on_progress: Callable[[str], None] = lambda text: None
) -> Result:
    """Time a step of every contender at every size, as one tensor and as a thousand of odd sizes.

    A time is the median of ``repeats`` rounds after three; in a round each contender takes one step, so that what
    slows the machine slows all.
    """
    torch.set_num_threads(threads)
    found, missing = contenders(device)
    stream = _stream(device, repeats)
    rows: list[Row] = []
    for size in sizes:
        for tensors in (1, SHARDS):
            on_progress(f"{size:,} parameters in {tensors:,} tensors")
            params = _parameters(size, tensors, device)
            entrants = [contender for contender in found if size <= contender.largest]
            times = _times([(entrant, entrant.make(params)) for entrant in entrants], device, repeats)
            adamw = statistics.median(times[ADAMW])
            rows += [_row(entrant, size, tensors, times[entrant.name], stream, adamw, threads) for entrant in entrants]
            del params  # before the next ones
    on_progress("host time")
    compared = [contender for contender in found if contender.name in (S3, ADAMW)]
    times_of_host = host.measure(compared, device, repeats)
    return Result(_machine(device, threads, repeats), stream / 1e9, rows, times_of_host, missing)


def _row(
    contender: Contender, size: int, tensors: int, times: list[float], stream: float, adamw: float, threads: int
) -> Row:
    seconds, moved = statistics.median(times), contender.bytes * size
    return Row(
        parameters=size,
        tensors=tensors,
        name=contender.name,
        ms=seconds * 1e3,
        bytes=contender.bytes,
        bandwidth=moved / seconds / 1e9,
        share_of_stream=moved / seconds / stream,
        ratio=seconds / adamw,
        ms_at_slow_cores=max(seconds, moved / (SLOW_CORE * threads)) * 1e3,
    )


def _times(
    entrants: list[tuple[Contender, torch.optim.Optimizer]], device: str, repeats: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {contender.name: [] for contender, _ in entrants}
    for round in range(WARM_UP + repeats):
        for contender, optimizer in entrants:
            seconds = _time(optimizer.step, device)
            if round >= WARM_UP:
                times[contender.name].append(seconds)
    return times


def _time(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return float(start_event.elapsed_time(end_event)) / 1e3


def _parameters(size: int, tensors: int, device: str) -> list[torch.nn.Parameter]:
    """Cut one flat buffer of weights and one of gradients into tensors of odd sizes, as a rank's shard is cut."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(size - 1, generator=generator)[: tensors - 1].sort().values + 1
    lengths = torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([size])).tolist()
    weights = torch.randn(size, generator=generator).to(device)
    grads = (torch.randn(size, generator=generator) * 1e-3).to(device)
    params = []
    for weight, grad in zip(weights.split(lengths), grads.split(lengths), strict=True):
        params.append(torch.nn.Parameter(weight))
        params[-1].grad = grad
    return params


def _stream(device: str, repeats: int) -> float:
    """Measure what the memory gives a loop that does nothing else, a <- a + 3 b in place: bytes a second.

    In place as a step is: a loop that writes what it has not read moves more than it seems to.
    """
    a, b = (torch.randn(60_000_000, device=device) for _ in range(2))
    times = [_time(lambda: a.add_(b, alpha=3.0), device) for _ in range(WARM_UP + repeats)]
    return 3 * a.element_size() * a.numel() / statistics.median(times[WARM_UP:])


def _machine(device: str, threads: int, repeats: int) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "deepspeed", "transformer-engine"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        processor, loop = torch.cuda.get_device_name(), "Triton"
    else:
        processor, loop = machine.processor(), library.loops()[0]
    return {
        "date": date.today().isoformat(),
        "device": device,
        "processor": processor,
        "kernel": loop,
        "threads": threads,
        "repeats": repeats,
        "python": platform.python_version(),
        "versions": versions,
    }


def as_json(result: Result, command: str) -> dict[str, Any]:
    """Return a result as it is stored: the command first, then everything measured."""
    return {"command": command, **asdict(result)}


def tables(result: Result) -> Iterator[Table]:
    """Lay out the rows, one table a size and layout."""
    for size, tensors in dict.fromkeys((row.parameters, row.tensors) for row in result.rows):
        table = Table(
            title=f"{size:,} parameters, {tensors:,} tensor{'s' * (tensors > 1)}",
            title_justify="left",
            caption="ms slow: computed, at 8 GB/s a core",
            caption_justify="left",
            box=None,
        )
        table.add_column("", no_wrap=True)
        for heading in ("ms", "bytes", "GB/s", "stream", "x AdamW", "ms slow"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in result.rows:
            if (row.parameters, row.tensors) == (size, tensors):
                table.add_row(
                    row.name,
                    f"{row.ms:.2f}",
                    f"{row.bytes}",
                    f"{row.bandwidth:.1f}",
                    f"{row.share_of_stream:.0%}",
                    f"{row.ratio:.2f}",
                    f"{row.ms_at_slow_cores:.2f}",
                )
        yield table
    table = Table(title="host time of a step, tensors of one element", title_justify="left", box=None)
    table.add_column("tensors", justify="right")
    for name in (S3, ADAMW):
        table.add_column(f"{name}: ms", justify="right", no_wrap=True)
    for tensors in host.TENSORS:
        ms = {row.name: row.ms for row in result.host if row.tensors == tensors}
        table.add_row(f"{tensors:,}", *(f"{ms[name]:.3f}" for name in (S3, ADAMW)))
    yield table
