"""What binds each of the C++ kernel's loops: instructions an element, the time they take, and the time its bytes take.

Instructions are counted where they run, one by one (a child is stepped by ptrace), over 1,024 elements and over 2,048:
the difference leaves out what a call costs. Arithmetic is a step over a hundred rows that are one and the same 1,024
elements, which stay in the first cache; memory is what the machine's a <- a + 3 b in place gives one thread, for the
bytes a step moves. The larger of the two is what is left to bind. Linux on x86-64. ATEN_CPU_CAPABILITY=avx2 leaves out
the loops of a better CPU.
"""

import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from s3_megatron.bench.about import about
from s3_megatron.bench.step import ceilings
from s3_megatron.errors import S3Error
from s3_megatron.kernels.call import form
from s3_megatron.kernels.cpu import library

ELEMENTS = 1024  # a multiple of every loop's block
TRACEME, SINGLESTEP = 0, 9  # of sys/ptrace.h
# The states' dtype, whether they are rounded stochastically, and the bytes of a step.
FORMATS = {
    "float32": (torch.float32, 0, 28),
    "bf16 states": (torch.bfloat16, 0, 20),
    "bf16 stochastic": (torch.bfloat16, 1, 20),
}
POWERS = (3.0, 2.0, 1.0, 1.5, 8.0)
TIMES = 100
ROUNDS = 15


@dataclass(frozen=True)
class Row:
    """One loop at one exponent and format; times in nanoseconds an element, on one thread."""

    loop: str
    p: float
    states: str
    instructions: float
    arithmetic: float
    memory: float


def step(loop: int, p: float, states: str, size: int, times: int = 1) -> Callable[[], None]:
    """Return a step of float32 weights and gradients by one of this machine's loops, ready to be called.

    It moves the same ``size`` elements ``times`` times.
    """
    dtype, stochastic, _ = FORMATS[states]
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, size, generator=generator)
    m, r = torch.zeros(2, size, dtype=dtype)
    settings = library.Settings(
        lr=1e-4, weight_decay=0.1, factor=1.0, beta1=0.95, one_minus_beta1=0.05, beta2=0.95, one_minus_beta2=0.05, p=p,
        bound=1.0, form=form(p), nesterov=1, stochastic=stochastic,
        types=(0, 0, library.TYPES[dtype], library.TYPES[dtype]),
    )  # fmt: skip
    row = (x.data_ptr(), g.data_ptr(), m.data_ptr(), r.data_ptr(), None, size)
    table = (ctypes.c_void_p * (6 * times))(*row * times)
    move, kept = library.load().s3_step, (x, g, m, r)

    def run() -> None:
        assert kept
        move(table, times, ctypes.byref(settings), loop, 1, None)

    return run


def instructions(run: Callable[[], None]) -> int:
    """Count the instructions of a call, and of the few hundred about it, in a child that is stepped through it."""
    run()  # what is done once is done
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        libc.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        run()
        os._exit(0)
    count = -1
    while True:
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            break
        count += 1
        if libc.ptrace(SINGLESTEP, child, None, None) < 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise S3Error("instructions are counted by ptrace, which is not allowed here: leave the container")
    return count


def seconds(run: Callable[[], None]) -> float:
    """Return the least time of a call."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def rows(bandwidth: float) -> Iterator[Row]:
    """Count and time every loop that runs here; ``bandwidth`` is in bytes a second."""
    for index, name in enumerate(library.loops()):
        for p in POWERS:
            for states, (_, _, moved) in FORMATS.items():
                long, short = (instructions(step(index, p, states, size)) for size in (2 * ELEMENTS, ELEMENTS))
                arithmetic = seconds(step(index, p, states, ELEMENTS, TIMES)) / (ELEMENTS * TIMES)
                yield Row(name, p, states, (long - short) / ELEMENTS, arithmetic * 1e9, moved / bandwidth * 1e9)


def measure() -> dict[str, Any]:
    """Count and time on one thread; returns the rows, and what they were measured on.

    Raises:
        S3Error: this is another system than Linux on x86-64, or it allows no ptrace.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise S3Error(f"instructions are counted on Linux on x86-64, and this is {sys.platform}, {platform.machine()}")
    torch.set_num_threads(1)
    bandwidth, _ = ceilings("cpu", ROUNDS)
    return {**about("cpu"), "bandwidth": bandwidth / 1e9, "rows": [asdict(row) for row in rows(bandwidth)]}


def tables(measured: dict[str, Any]) -> Iterator[Table]:
    """Lay out the table."""
    table = Table(title=f"{measured['processor']}: {measured['bandwidth']:.1f} GB/s a thread", title_justify="left")
    for column in ("loop", "p", "states", "instructions an element", "arithmetic ns", "memory ns", "bound by"):
        table.add_column(column, justify="left" if column in ("loop", "states") else "right")
    for row in (Row(**row) for row in measured["rows"]):
        bound = "arithmetic" if row.arithmetic > row.memory else "memory"
        times = f"{row.arithmetic:.2f}", f"{row.memory:.2f}"
        table.add_row(row.loop, f"{row.p:g}", row.states, f"{row.instructions:.1f}", *times, bound)
    yield table
