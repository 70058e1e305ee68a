"""Clocks: what a step takes as a trainer sees it, on the GPU alone, and as a replayed graph."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 3
# The GPU's cycles that a queue is held up, so that Python has queued a whole step before its first kernel starts:
# 0.1 s at 2 GHz.
_HELD = 200_000_000


@dataclass(frozen=True)
class Times:
    """Seconds of one step; on a CPU there is the whole alone."""

    whole: float  # until all is done
    kernels: float | None = None  # the GPU's own time


def once(step: Callable[[], object], device: str) -> Times:
    """Time one step."""
    if device == "cpu":
        return Times(_host(step))
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    torch.cuda._sleep(_HELD)
    begin, end = _events()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return Times(whole, float(begin.elapsed_time(end)) / 1e3)


def median(times: list[Times]) -> Times:
    """The medians of every clock."""
    kernels = [one.kernels for one in times if one.kernels is not None]
    return Times(statistics.median(one.whole for one in times), statistics.median(kernels) if kernels else None)


def replayed(step: Callable[[], object], device: str, repeats: int) -> float | None:
    """The median seconds of a step captured in a CUDA graph; None on a CPU."""
    if device == "cpu":
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a first step allocates, which a graph may not
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return steady(graph.replay, device, repeats)


def steady(run: Callable[[], object], device: str, repeats: int) -> float:
    """The median seconds of something that Python queues at once, by the GPU's clock where there is one."""
    times = []
    for _ in range(WARM_UP + repeats):
        if device == "cpu":
            times.append(_host(run))
            continue
        begin, end = _events()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(times[WARM_UP:])


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _host(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
