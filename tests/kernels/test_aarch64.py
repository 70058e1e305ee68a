"""The C++ kernel cross-compiled for aarch64, run under an emulator, against this machine's own loops."""

import ctypes
import itertools
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s3_megatron.kernels import cpu
from s3_megatron.kernels.call import AnyRule, Rule, SoftRule
from s3_megatron.kernels.cpu import build, library

COMPILER, EMULATOR, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
WIDE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
LR, DECAY, FACTOR, INF = 0.1, 0.1, 0.5, math.inf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}: g++-aarch64-linux-gnu, qemu-user"),
]


@dataclass
class Problem:
    """Weights, gradients, m, r and a low-precision copy of the weights, either None where there is none; and a rule."""

    columns: list[Tensor | None]
    rule: AnyRule
    stochastic: bool = False
    threads: int = 1

    def settings(self) -> library.Settings:
        seed = 0x243F6A8885A308D3 if self.stochastic else None
        return cpu._settings(self.rule, FACTOR, seed, *(None if x is None else x.dtype for x in self.columns))

    def written(self) -> bytes:
        """The problem as harness.cpp reads it."""
        parts = [b"" if x is None else memory(x) for x in self.columns]
        assert self.columns[0] is not None
        sizes = [isinstance(self.rule, SoftRule), self.columns[0].numel(), self.threads, *map(len, parts)]
        return bytes(self.settings()) + b"".join(int(size).to_bytes(8, "little") for size in sizes) + b"".join(parts)

    def here(self, loop: int) -> tuple[list[Tensor | None], Tensor]:
        """Moved by this machine's loop; the columns and the five statistics."""
        moved = [None if x is None else x.clone() for x in self.columns]
        addresses = [None if x is None else x.data_ptr() for x in moved]
        row = (ctypes.c_void_p * 6)(*addresses, moved[0].numel())  # a pointer is as wide as numel
        statistics = torch.zeros(5, dtype=torch.float64)
        settings, its = self.settings(), library.load()
        step = its.s3_softsignum_step if isinstance(self.rule, SoftRule) else its.s3_step
        step(row, 1, ctypes.byref(settings), loop, self.threads, statistics.data_ptr())
        return moved, statistics


def memory(x: Tensor) -> bytes:
    return x.view(torch.uint8).numpy().tobytes()


def problems() -> list[Problem]:
    """Every format, exponent, temperature and rounding; odd lengths; sound, huge, tiny, zero and broken gradients."""
    generator = torch.Generator().manual_seed(0)
    found = []

    def add(size: int, dtypes: tuple[torch.dtype, ...], model: torch.dtype | None, rule: AnyRule, **more) -> None:
        def draw() -> Tensor:
            return torch.randn(size, generator=generator)

        scale = 10.0 ** (draw() * 2).clamp(-3, 3)
        r = draw().abs() + 0.1
        x, g, m = draw(), draw() * scale, r * (draw() / 3).clamp(-1, 1)
        g[5::97], g[11::97], g[17::97] = 0.0, torch.nan, -torch.inf
        m, r = m * scale, r * scale
        if isinstance(rule, SoftRule):  # what is left of m after thousands of zero gradients
            g[23::97], m[23::97], m[5::97] = 0.0, -(2.0**-133), -0.0
        copy = None if model is None else torch.full((size,), 7.0, dtype=model)
        param, grad, state = dtypes
        its_r = r.to(state) if isinstance(rule, Rule) else None
        found.append(Problem([x.to(param), g.to(grad), m.to(state), its_r, copy], rule, **more))

    def s3(p: float, nesterov: bool = True) -> Rule:
        return Rule(LR, 0.95, 0.95, p, DECAY, nesterov)

    def softsignum(tau: float, nesterov: bool = True, beta: float = 0.95) -> SoftRule:
        return SoftRule(LR, beta, tau, DECAY, nesterov, maximize=not nesterov)

    formats = itertools.product((WIDE, BRAIN, HALF), (WIDE, BRAIN, HALF), (WIDE, BRAIN), (None, BRAIN, HALF))
    powers, betas = itertools.cycle([1, 1.5, 2, 3, 8]), itertools.cycle([0.95, 0.3, 0.0])
    for number, (*dtypes, model) in enumerate(formats):
        for tau in (INF, 5.0):
            add(1027, tuple(dtypes), model, s3(next(powers), number % 2 == 0))
            add(1027, tuple(dtypes), model, softsignum(tau, number % 2 == 0, next(betas)))
    rules = [*map(s3, (1, 1.5, 2, 3, 8)), *map(softsignum, (INF, 1e4, 5.0))]
    for rule, (state, stochastic), model in itertools.product(
        rules, ((WIDE, False), (BRAIN, False), (BRAIN, True)), (None, BRAIN)
    ):
        for size in (1, 17, 4099):  # the usual run's own loops
            add(size, (WIDE, WIDE, state), model, rule, stochastic=stochastic)
    for rule in (s3(3), softsignum(5.0)):
        add(40_001, (WIDE, WIDE, WIDE), BRAIN, rule, threads=2)
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


def tolerances(problem: Problem, x: Tensor, r: Tensor | None) -> list[Tensor | None]:
    """How far two loops may be apart in each column, by what one has made of the weights and of r.

    Of S3 both are held to 8 units of 2^-24 of the oracle (test_single_pass), so to 16 of each other. A SoftSignum m is
    off by 4 roundings of its larger part, twice with a look-ahead; tanh by 4 units each, and by tau times what m is
    off; a sign only where m is all but 0. A weight goes with its update, in each loop with two roundings of that and
    one of itself.
    """
    rule, unit = problem.rule, 2**-24
    if isinstance(rule, Rule):
        assert r is not None
        off, wide_m, wide_r = torch.full_like(x, 2 * 16 * unit), 16 * unit * r, 16 * unit * r
    else:
        grad, m = (problem.columns[kind].double() for kind in (1, 2))
        grad *= -FACTOR if rule.maximize else FACTOR
        wide_m, wide_r = 8 * unit * torch.maximum(m.abs(), grad.abs()) + 2.0**-148, None
        n = torch.lerp(m, grad, 1 - rule.beta)
        n = torch.lerp(n, grad, 1 - rule.beta) if rule.nesterov else n
        hard = torch.where(n.abs() > 2 * wide_m + torch.finfo(WIDE).tiny, 0.0, 2.0)
        off = hard if rule.hard else 8 * unit + (rule.tau * wide_m).clamp(max=2.0)
    largest = torch.maximum(problem.columns[0].double().abs(), x.abs())
    weight = LR * (off + 4 * unit) + 2 * unit * largest
    return [weight, None, wide_m, wide_r, weight]


def test_neon_is_the_portable_loop_but_for_rounding(given, emulated):
    """Here without fused multiply-add; a number stored in 16 bits may then fall to the neighbour, by its own unit."""
    portable = library.loops().index("portable")
    moving = there = 0
    for problem, (columns, _) in zip(given, emulated, strict=True):
        wanted, _ = problem.here(portable)
        allowed = tolerances(problem, wanted[0].double(), None if wanted[3] is None else wanted[3].double())
        assert same(columns[1], problem.columns[1])
        for before, ours, theirs, tolerance in zip(problem.columns, columns, wanted, allowed, strict=True):
            if tolerance is None or theirs is None:
                continue
            kept = torch.finfo(theirs.dtype)
            step = 0 if theirs.dtype == WIDE else theirs.double().abs() * kept.eps
            limit = tolerance + step + kept.smallest_normal * kept.eps
            broken = ~problem.columns[1].isfinite()
            assert ((ours.double() - theirs.double()).abs() <= limit)[~broken].all(), problem
            assert torch.equal(ours[broken], theirs[broken])
            moving += not same(before, theirs)
            there += 1
    assert moving > there * 0.9
