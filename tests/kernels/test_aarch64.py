"""The C++ kernel cross-compiled for aarch64, run under an emulator, against this machine's own loops."""

import ctypes
import itertools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s3_megatron.kernels.call import form
from s3_megatron.kernels.cpu import build, library

COMPILER, EMULATOR, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
WIDE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
BETA, LR, DECAY = 0.95, 0.1, 0.1

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}: g++-aarch64-linux-gnu, qemu-user"),
]


@dataclass
class Problem:
    """Weights, gradients, m, r and a low-precision copy of the weights (None: there is none), and what to do."""

    columns: list[Tensor | None]
    p: float
    nesterov: bool
    stochastic: bool
    threads: int = 1

    def settings(self) -> library.Settings:
        kinds = [WIDE if x is None else x.dtype for x in self.columns]
        return library.Settings(
            lr=LR, weight_decay=DECAY, factor=0.5, beta1=BETA, one_minus_beta1=1 - BETA, beta2=BETA,
            one_minus_beta2=1 - BETA, p=self.p, bound=1.0, form=form(self.p),
            nesterov=self.nesterov, stochastic=self.stochastic, types=tuple(library.TYPES[kind] for kind in kinds),
            seed=(0x243F6A88, 0x85A308D3),
        )  # fmt: skip

    def written(self) -> bytes:
        """The problem as harness.cpp reads it."""
        parts = [b"" if x is None else memory(x) for x in self.columns]
        assert self.columns[0] is not None
        sizes = [self.columns[0].numel(), self.threads, *map(len, parts)]
        return bytes(self.settings()) + b"".join(size.to_bytes(8, "little") for size in sizes) + b"".join(parts)

    def here(self, loop: int) -> tuple[list[Tensor | None], Tensor]:
        """Moved by this machine's loop; the columns and the five statistics."""
        moved = [None if x is None else x.clone() for x in self.columns]
        addresses = [None if x is None else x.data_ptr() for x in moved]
        row = (ctypes.c_void_p * 6)(*addresses, moved[0].numel())  # a pointer is as wide as numel
        statistics = torch.zeros(5, dtype=torch.float64)
        settings = self.settings()
        library.load().s3_step(row, 1, ctypes.byref(settings), loop, self.threads, statistics.data_ptr())
        return moved, statistics


def memory(x: Tensor) -> bytes:
    return x.view(torch.uint8).numpy().tobytes()


def problems() -> list[Problem]:
    """Every format, exponent and way to round; odd lengths; sound, huge, tiny, zero and broken gradients."""
    generator = torch.Generator().manual_seed(0)
    found = []

    def add(size: int, dtypes: tuple[torch.dtype, ...], model: torch.dtype | None, p: float, **more) -> None:
        def draw() -> Tensor:
            return torch.randn(size, generator=generator)

        scale = 10.0 ** (draw() * 2).clamp(-3, 3)
        r = draw().abs() + 0.1
        x, g, m = draw(), draw() * scale, r * (draw() / 3).clamp(-1, 1)
        g[5::97], g[11::97], g[17::97] = 0.0, torch.nan, -torch.inf
        copy = None if model is None else torch.full((size,), 7.0, dtype=model)
        param, grad, state = dtypes
        columns = [x.to(param), g.to(grad), (m * scale).to(state), (r * scale).to(state), copy]
        found.append(Problem(columns, p, **more))

    formats = itertools.product((WIDE, BRAIN, HALF), (WIDE, BRAIN, HALF), (WIDE, BRAIN), (None, BRAIN, HALF))
    powers = itertools.cycle([1, 1.5, 2, 3, 8])
    for number, (param, grad, state, model) in enumerate(formats):
        for p in (next(powers), next(powers)):
            add(1027, (param, grad, state), model, p, nesterov=number % 2 == 0, stochastic=False)
    for p, (state, stochastic), model in itertools.product(
        (1, 1.5, 2, 3, 8), ((WIDE, False), (BRAIN, False), (BRAIN, True)), (None, BRAIN)
    ):
        for size in (1, 17, 4099):  # the usual run's own loops
            add(size, (WIDE, WIDE, state), model, p, nesterov=True, stochastic=stochastic)
    add(40_001, (WIDE, WIDE, WIDE), BRAIN, 3, nesterov=True, stochastic=False, threads=2)
    return found


@pytest.fixture(scope="module")
def given() -> list[Problem]:
    return problems()


@pytest.fixture(scope="module")
def emulated(given, tmp_path_factory) -> list[tuple[list[Tensor | None], Tensor]]:
    """What the library for aarch64 makes of the problems: columns and statistics."""
    folder = tmp_path_factory.mktemp("aarch64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        patch.setattr(build, "LOOPS", {"s3_portable": []})  # as build.py chooses for that machine: test_build
        build.compile_library(folder / "step.so")
    program = folder / "harness"
    source = Path(__file__).with_name("harness.cpp")
    command = [COMPILER, "-O1", f"-I{build.FOLDER}", str(source), str(folder / "step.so"), f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run(
        [EMULATOR, "-L", ROOT, str(program)],
        input=b"".join(map(Problem.written, given)),
        capture_output=True,
        check=True,
        timeout=300,
    )
    assert done.stderr.decode().strip() == "portable"
    results, at = [], 0
    for problem in given:
        columns: list[Tensor | None] = []
        for x in problem.columns:
            size = 0 if x is None else x.numel() * x.element_size()
            part = torch.frombuffer(bytearray(done.stdout[at : at + size]), dtype=x.dtype) if x is not None else None
            columns.append(part)
            at += size
        results.append((columns, torch.frombuffer(bytearray(done.stdout[at : at + 40]), dtype=torch.float64)))
        at += 40
    assert at == len(done.stdout)
    return results


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and memory(a) == memory(b))


def test_neon_is_avx2_to_the_bit(given, emulated):
    """Both multiply and add with one rounding, in the same order: a job may move between such machines.

    Only sums of statistics go by the width of a register: to 2^-18, half a unit for each of 1,024 float32 numbers.
    """
    if len(library.loops()) == 1:
        pytest.skip("this CPU has neither AVX2 nor AVX-512")
    for problem, (columns, statistics) in zip(given, emulated, strict=True):
        wanted, sums = problem.here(0)
        assert all(map(same, columns, wanted)), problem
        torch.testing.assert_close(statistics, sums, rtol=2**-18, atol=0)


def test_neon_is_the_portable_loop_but_for_rounding(given, emulated):
    """Here without fused multiply-add: both are held to 8 units of 2^-24 of the oracle (test_single_pass), so to 16 of
    each other; a number stored in 16 bits may then fall to the neighbour, one unit of its own."""
    portable = library.loops().index("portable")
    moving = 0
    for problem, (columns, _) in zip(given, emulated, strict=True):
        wanted, _ = problem.here(portable)
        x, r = wanted[0].double(), wanted[3].double()
        assert same(columns[1], problem.columns[1])
        unit = 16 * 2**-24
        # A weight goes with its update, |u| <= 1, and two roundings of its own size.
        allowed = [LR * 2 * unit + 2 * x.abs() * 2**-24, None, unit * r, unit * r, None]
        allowed[4] = allowed[0]
        for before, ours, theirs, tolerance in zip(problem.columns, columns, wanted, allowed, strict=True):
            if tolerance is None or theirs is None:
                continue
            kept = torch.finfo(theirs.dtype)
            step = 0 if theirs.dtype == WIDE else theirs.double().abs() * kept.eps
            limit = tolerance + step + kept.smallest_normal * kept.eps
            assert ((ours.double() - theirs.double()).abs() <= limit).all(), problem
            moving += not same(before, theirs)
    assert moving > 3 * len(given) * 0.9
