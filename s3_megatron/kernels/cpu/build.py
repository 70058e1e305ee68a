"""Compiling the C++ kernel, when the package is installed or at first use. Standard library only, for setup.py."""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
# Compiled once for every loop, and once.
STEPS, OTHERS = ("step.cpp", "softsignum.cpp"), ("dispatch.cpp", "metadata.cpp")
SOURCES = ("step.h", "lanes.h", "formats.h", "powers.h", "tally.h", "walk.h", "metadata.h", *STEPS, *OTHERS)

# No -march=native: the library chooses its loop where it runs. Compiled without traps and errno, which vectors do not
# keep; without contraction, so that every copy of the loop rounds alike; and without the scheduler's first pass, which
# takes alternating chains of operations apart again (lanes.h).
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fno-schedule-insns2", "-fno-unswitch-loops"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# STEPS are compiled once for each, under the namespace that dispatch.cpp knows.
LOOPS: dict[str, list[str]] = {"s3_portable": []}
# The variable names the machine to compile for where that is another one (linux-aarch64), as it does for setuptools.
if os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).endswith("x86_64"):
    LOOPS |= {"s3_avx2": AVX2, "s3_avx512": AVX512, "s3_avx512_bf16": [*AVX512, "-mavx512bf16"]}


class BuildError(RuntimeError):
    """The library could not be compiled; the text says why, for people."""


def fingerprint() -> str:
    """Name what a library is made from; it distinguishes an outdated one from a current one."""
    digest = hashlib.sha256(repr((FLAGS, LOOPS)).encode())
    for name in SOURCES:
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str]:
    """Return the C++ compiler's command: $CXX, or the first found.

    Raises:
        BuildError: there is none.
    """
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise BuildError("no C++ compiler was found: install g++, or name one in CXX")
    return [found]


def compile_library(target: Path, extra: list[str] | None = None) -> None:
    """Compile the library and put it at ``target``, all or nothing; ``extra`` flags go to every command.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    command = [*compiler(), *FLAGS, *(extra or [])]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command += _threads(command, Path(folder, "probe.so"))
        jobs = [
            (step, Path(folder, f"{loop}-{step}.o"), [*flags, f"-DS3_LOOP={loop}"])
            for step in STEPS
            for loop, flags in LOOPS.items()
        ]
        jobs += [(name, Path(folder, f"{name}.o"), [f'-DS3_FINGERPRINT="{fingerprint()}"']) for name in OTHERS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: _run([*command, *job[2], "-c", str(FOLDER / job[0]), "-o", str(job[1])]), jobs))
        library = Path(folder, target.name)
        _run([*command, "-shared", *(str(job[1]) for job in jobs), "-o", str(library)])
        os.replace(library, target)


def _threads(command: list[str], probe: Path) -> list[str]:
    """Return the flag for OpenMP, or none where it does not link: Apple's clang, or clang without libomp.

    On macOS never: a runtime beside the libomp that torch brings along ends the process.
    """
    look = [*command, "-shared", "-x", "c++", os.devnull, "-o", str(probe)]
    reason = "macOS"
    if sys.platform != "darwin":
        try:
            _run([*look, "-fopenmp"])
            return ["-fopenmp"]
        except BuildError as error:
            _run(look)  # does it compile at all?
            reason = str(error)
    logger.warning("the C++ kernel is compiled without OpenMP and runs on one thread (%s)", reason)
    return []


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise BuildError(f"the compiler did not start: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else f'exit code {done.returncode}'}")
