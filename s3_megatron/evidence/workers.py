"""The processes that train stacks: they end with the program that started them."""

import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import c_double
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import torch

from s3_megatron import machine
from s3_megatron.errors import S3Error
from s3_megatron.evidence import text
from s3_megatron.evidence.cells import Cell, Result, commit
from s3_megatron.evidence.text import Text
from s3_megatron.evidence.training import train

PROBED_STEPS = 4  # the first is not timed
GRACE_SECONDS = 2.0  # after the deadline a step that goes on is cut off: one of a large model takes a minute of a core


@dataclass
class _Here:
    """What a worker knows, once it has begun."""

    corpus: Text
    device: str
    steps: Any  # a shared number for each worker: how far its stack is
    deadline: Any  # shared, by time.monotonic(), which is one clock on a machine


_here: _Here


class Workers:
    """A pool of workers, to be used in a ``with`` block; each trains one stack at a time."""

    def __init__(self, count: int, corpus: str, device: str, deadline: float) -> None:
        """Start ``count`` workers over the text of this name; nothing trains after ``deadline`` (time.monotonic())."""
        context = multiprocessing.get_context("spawn")
        self._steps = context.RawArray(c_double, count)
        self._deadline = context.RawValue(c_double, deadline)
        self._pool = ProcessPoolExecutor(
            count, context, _begin, (corpus, device, self._steps, self._deadline, os.getpid())
        )
        self._free = list(range(count))
        self._running: dict[Future[Any], tuple[int, Sequence[Cell]]] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadline.value = 0.0
        self._pool.shutdown(cancel_futures=True)

    @property
    def free(self) -> int:
        """The number of workers without work."""
        return len(self._free)

    @property
    def cells(self) -> list[Cell]:
        """The cells in training."""
        return [cell for _, cells in self._running.values() for cell in cells]

    @property
    def steps(self) -> float:
        """Steps taken, of cells in training, times the members of their stacks."""
        return sum(self._steps[place] * len(cells) for place, cells in self._running.values())

    def train(self, cells: Sequence[Cell]) -> None:
        """Give a free worker a stack."""
        self._give(_train, cells)

    def probe(self, cells: Sequence[Cell]) -> None:
        """Have a free worker time the first steps of a stack."""
        self._give(_probe, cells)

    def _give(self, work: Callable[..., Any], cells: Sequence[Cell]) -> None:
        place = self._free.pop()
        self._steps[place] = 0
        self._running[self._pool.submit(work, list(cells), place)] = place, cells

    def finished(self, seconds: float) -> list[tuple[Sequence[Cell], Any]]:
        """Wait so long at most; returns stacks that are done and their results, None where the deadline came first.

        Raises:
            S3Error: a worker was killed.
        """
        done, _ = wait(self._running, timeout=seconds, return_when=FIRST_COMPLETED)
        found = []
        for future in done:
            place, cells = self._running.pop(future)
            self._free.append(place)
            try:
                found.append((cells, future.result()))
            except BrokenProcessPool:
                if time.monotonic() >= self._deadline.value:
                    found.append((cells, None))
                    continue
                raise S3Error(
                    "a worker was killed, perhaps for its memory; what is finished is kept: run the same command again"
                ) from None
            except torch.OutOfMemoryError as error:
                raise S3Error(
                    f"a stack of {len(cells)} does not fit into the GPU's memory: end what else is on it, and run the "
                    f"same command again ({str(error).splitlines()[0]})"
                ) from None
        return found


def _begin(corpus: str, device: str, steps: Any, deadline: Any, parent: int) -> None:
    """Get a worker ready."""
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=_end_with, args=(parent, deadline), daemon=True).start()
    torch.set_num_threads(1)
    _here = _Here(text.load(corpus).to(device), device, steps, deadline)


def _end_with(parent: int, deadline: Any) -> None:
    """End this process when its parent is gone, since it would wait for work for ever, or the time is over."""
    while os.getppid() == parent and time.monotonic() < deadline.value + GRACE_SECONDS:
        time.sleep(0.5)
    os._exit(1)


def _train(cells: list[Cell], place: int) -> list[Result] | None:
    def go_on(step: int) -> bool:
        _here.steps[place] = step
        return time.monotonic() < _here.deadline.value

    results = train(cells, _here.corpus, _here.device, go_on)
    where = here(_here.device)
    return results and [{**result, **where} for result in results]


def _probe(cells: list[Cell], place: int) -> float | None:
    """Return the seconds of a step of a stack; None where the deadline came first."""
    times: list[float] = []

    def go_on(step: int) -> bool:
        if _here.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic())
        return step < PROBED_STEPS and times[-1] < _here.deadline.value

    steps = PROBED_STEPS + 1
    short = [replace(cell, setup=replace(cell.setup, steps=steps, kick_step=-1)) for cell in cells]
    train(short, _here.corpus, _here.device, go_on)
    return (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else None


def here(device: str) -> Result:
    """Say where and with what a result was made."""
    card = torch.cuda.get_device_name() if device == "cuda" else machine.processor()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return {
        "commit": commit(),
        "card": card,
        "versions": versions,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
