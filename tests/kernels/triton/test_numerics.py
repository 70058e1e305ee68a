"""Runs the interpreted cases, S3's and SoftSignum's, in a process of their own: the interpreter is chosen at import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_the_kernel_is_the_oracle_in_the_interpreter():
    cases = [Path(__file__).with_name(f"interpreted_{name}cases.py") for name in ("", "soft_")]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *map(str, cases)]
    # The edges divide by zero and overflow on purpose, which NumPy would report.
    command += ["-W", "ignore::RuntimeWarning"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=cases[0].parents[3], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\d{2,} passed", run.stdout, re.MULTILINE), run.stdout
    assert "skipped" not in run.stdout
