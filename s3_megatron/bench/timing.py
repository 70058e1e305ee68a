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
        return Times(called(step))
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    torch.cuda._sleep(_HELD)
    return Times(whole, queued(step, device))


def median(times: list[Times]) -> Times:
    """The medians of every clock."""
    kernels = [one.kernels for one in times if one.kernels is not None]
    return Times(statistics.median(one.whole for one in times), statistics.median(kernels) if kernels else None)


def replayed(step: Callable[[], object], device: str, repeats: int) -> float:
    """The median seconds of a step captured in a CUDA graph."""
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
    return statistics.median([queued(run, device) for _ in range(WARM_UP + repeats)][WARM_UP:])


def queued(run: Callable[[], object], device: str) -> float:
    """Seconds of what a call queues, by the GPU's clock where there is one."""
    if device == "cpu":
        return called(run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def called(run: Callable[[], object]) -> float:
    """Seconds until a call returns: on a GPU, until all is queued."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
