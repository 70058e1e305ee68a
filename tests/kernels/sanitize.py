"""`make sanitize`: the C++ kernel's tests, once, with a library compiled under ASan and UBSan."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from s3_megatron.kernels.cpu.build import compile_library, compiler

# One register at a time, without the checks that ASan makes too, and without the passes that take the compiler longest
# and only make a faster library: with all of it the compiler takes ten minutes.
FLAGS = [
    *("-g1", "-O1", "-DS3_REGISTERS=1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize=null,alignment,object-size,pointer-overflow,bounds,vptr",
    *("-fno-tree-pta", "-fira-algorithm=priority"),
]
NAMES = ("single_pass", "oracle", "edges", "fuzz", "metadata", "softsignum_one_pass", "softsignum_pass")
TESTS = [f"tests/kernels/test_{name}.py" for name in NAMES]
# Ten thousand steps would take a quarter of an hour, and go where one goes; allocations are the sanitizer's own.
LEFT_OUT = "not ten_thousand and not allocates and not compiled_library"


def _runtime(name: str) -> str:
    command = [*compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Return pytest's exit code; a memory error or undefined behaviour ends it with the sanitizer's report."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "step.so")
        print("compiling with", *FLAGS, flush=True)
        began = time.monotonic()
        compile_library(library, FLAGS)
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        # Its runtime must come before all else that allocates; with C++'s own beside it, or an exception of torch's
        # ends the process.
        runtimes = [_runtime(name) for name in ("libasan.so", "libstdc++.so")]
        environment = os.environ | {
            "LD_PRELOAD": ":".join(runtimes),
            "S3_MEGATRON_KERNEL": str(library),
            # Python and torch free nothing at exit.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        # --capture=sys: a sanitizer's report goes past Python's stderr, and pytest would take it along when it dies.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider"]
        command += ["-k", LEFT_OUT, *TESTS]
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
