"""What the tests of this folder run on: a GPU, or, with TRITON_INTERPRET=1, the CPU in Triton's interpreter.

``make gpu DRY=1`` runs them so: no test meets its first run on a real card. What only a GPU has, graphs and streams,
has a stand-in here that does the same to the tensors.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s3_megatron.kernels.triton import unavailable

REAL = torch.cuda.is_available()
DEVICE = "cuda" if REAL else "cpu"
REASON = unavailable()
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_card = pytest.mark.skipif(not REAL, reason="no GPU, and nothing stands in for it here")


def size(on_a_gpu: int, interpreted: int) -> int:
    """How many elements: the interpreter takes 20 ms a thousand."""
    return on_a_gpu if REAL else interpreted


def capture(step: Callable[[], object]) -> Callable[[], object]:
    """Capture a step in a CUDA graph, which does not run it; returns what replays it."""
    if not REAL:
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextlib.contextmanager
def on_a_late_stream() -> Iterator[None]:
    """Queue work on a stream of its own that does nothing for some 50 ms; no stream waits for another."""
    if not REAL:
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # cycles
        yield


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """Raise where the host waits for the GPU; on the CPU, where a value is read that would be there."""
    if not REAL:
        with _Reads():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Reads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A rate on the CPU is read there; what would be on the GPU has one element at least, in a row.
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dim():
            raise AssertionError("the host reads a value")
        return func(*args, **kwargs or {})


def allocations() -> int:
    """How often the GPU's memory was asked for so far; 0 on the CPU."""
    torch.cuda.synchronize() if REAL else None
    return torch.cuda.memory_stats()["allocation.all.allocated"] if REAL else 0


def visible() -> dict[str, str]:
    """The environment in which ranks find the card; tests' ranks see none by default."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")} if REAL else {}
