"""The processes that train stacks: they end with the program that started them."""

import math
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
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from s3_megatron import machine
from s3_megatron.errors import S3Error, first_line
from s3_megatron.evidence import text
from s3_megatron.evidence.cells import Cell, Result, code_sha256, commit
from s3_megatron.evidence.text import Text
from s3_megatron.evidence.training import train

ENDINGS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
PROBED_STEPS = 4  # the first is not timed
# After the deadline a step that goes on is cut off, and what was trained since the stack was begun or gone on with is
# lost: one of a large model takes a minute of a core. Within them stacks are kept.
GRACE_SECONDS = 10.0
KILLED = "a worker was killed, perhaps for its memory; what is finished is kept: run the same command again"


@dataclass
class _Here:
    """What a worker knows, once it has begun."""

    corpus: Text
    device: str
    steps: Any  # a shared number for each worker: how far its stack is
    deadline: Any  # shared, by time.monotonic(), which is one clock on a machine
    kept: Path  # where stacks are that were stopped
    where: Result
    ended: float = math.inf  # when this worker alone was asked to end

    @property
    def end(self) -> float:
        """Until when there is time."""
        return min(float(self.deadline.value), self.ended)


_here: _Here


class Workers:
    """A pool of workers, to be used in a ``with`` block; each trains one stack at a time."""

    def __init__(self, count: int, corpus: tuple[str, int], device: str, deadline: float, kept: Path) -> None:
        """Start ``count`` workers over the text of this name and vocabulary.

        Nothing trains after ``deadline`` (time.monotonic()). What is not finished then is in the folder ``kept``, and
        gone on with from there.
        """
        context = multiprocessing.get_context("spawn")
        self._steps = context.RawArray(c_double, count)
        self._deadline = context.RawValue(c_double, deadline)
        self._pool = ProcessPoolExecutor(
            count, context, _begin, (corpus, device, self._steps, self._deadline, kept, os.getpid())
        )
        self._free = list(range(count))
        self._running: dict[Future[Any], tuple[int, Sequence[Cell]]] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadline.value = min(self._deadline.value, time.monotonic())
        if kind and not self.steps:  # nothing to keep: on a busy machine a worker takes minutes until it listens
            _kill()
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
        # A worker that this begins has them blocked from its first moment: Ctrl-C is for all processes of a terminal.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
        try:
            self._running[self._pool.submit(work, list(cells), place)] = place, cells
        except BrokenProcessPool:
            raise S3Error(KILLED) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def finished(self, seconds: float) -> list[tuple[Sequence[Cell], Any]]:
        """Wait so long at most; returns stacks that are done and their results, None where the deadline came first.

        Raises:
            S3Error: a worker was killed, or had too little memory.
        """
        if time.monotonic() > self._deadline.value + GRACE_SECONDS:  # one that has not begun yet does not know of it
            _kill()
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
                raise S3Error(KILLED) from None
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                raise S3Error(
                    f"a stack of {len(cells)} does not fit into the memory: end what else is in it, or give fewer "
                    f"--workers, and run the same command again ({first_line(error)})"
                ) from None
        return found


def _kill() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def _begin(corpus: tuple[str, int], device: str, steps: Any, deadline: Any, kept: Path, parent: int) -> None:
    """Get a worker ready."""
    global _here
    torch.set_num_threads(1)
    _here = _Here(text.load(*corpus).to(device), device, steps, deadline, kept, here(device))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    for number in ENDINGS - {signal.SIGINT}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)


def _end(number: int, frame: object) -> None:
    """Have this worker keep its stack and end: SIGTERM comes from a cluster, or from a pool whose other worker died."""
    _here.ended = time.monotonic()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, since it would wait for work for ever, or the time is over."""
    while os.getppid() == parent and time.monotonic() < _here.end + GRACE_SECONDS:
        time.sleep(0.5)
    os._exit(1)


def _train(cells: list[Cell], place: int) -> list[Result] | None:
    last = time.monotonic()

    def go_on(step: int) -> bool:
        """Whether a step that takes as long as the one before ends in time."""
        nonlocal last
        _here.steps[place] = step
        before, last = last, time.monotonic()
        return last + (last - before) < _here.end

    machine_bits = [_here.where["card"], _here.where["versions"], torch.backends.cpu.get_cpu_capability()]
    by = [*(cell.key for cell in cells), code_sha256(), *machine_bits]
    results = train(cells, _here.corpus, _here.device, go_on, (file_of(_here.kept, cells), by))
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return results and [{**result, **_here.where, "at": at} for result in results]


def file_of(kept: Path, cells: Sequence[Cell]) -> Path:
    """Where a stack is that was stopped."""
    return kept / f"{cells[0].key}.pt"


def _probe(cells: list[Cell], place: int) -> float | None:
    """Return the seconds of a step of a stack; None where the deadline came first."""
    times: list[float] = []

    def go_on(step: int) -> bool:
        if _here.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic())
        return step < PROBED_STEPS and times[-1] < _here.end

    steps = PROBED_STEPS + 1
    short = [replace(cell, setup=replace(cell.setup, steps=steps, kick=1.0, kick_step=-1)) for cell in cells]
    train(short, _here.corpus, _here.device, go_on)
    return (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else None


def here(device: str) -> Result:
    """Say where and with what a result was made."""
    card = torch.cuda.get_device_name() if device == "cuda" else machine.processor()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return {"commit": commit(), "card": card, "versions": versions}
