"""Starting the node agent of s3_megatron.jobs as a job does, on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.launcher import ROOT


def start(
    run: Path, command: Sequence[str], minutes: float = 1.0, hang_minutes: float = 1.0, **environ: str
) -> subprocess.Popen[str]:
    flags = ["--run-dir", str(run), "--attempt", "1-0", "--start-minutes", str(minutes)]
    agent = [sys.executable, "-m", "s3_megatron.jobs.node", *flags, "--hang-minutes", str(hang_minutes), "--"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    settings = {**kept, "PYTHONPATH": str(ROOT), "SLURMD_NODENAME": "node1", **environ}
    pipe = subprocess.PIPE
    return subprocess.Popen([*agent, *command], env=settings, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def end(run: Path, agent: subprocess.Popen[str], timeout: float = 200) -> tuple[int, dict[str, Any], str]:
    """Wait for the agent; returns its exit code, its verdict, and what was printed."""
    try:
        printed, _ = agent.communicate(timeout=timeout)
    finally:
        if agent.poll() is None:
            agent.send_signal(signal.SIGINT)  # it ends its own
    return agent.returncode, json.loads((run / "attempts/1-0/node1.json").read_text()), printed


def wait_for(condition: Callable[[], Any], seconds: float = 100) -> Any:
    limit = time.monotonic() + seconds
    while not (seen := condition()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)
    return seen
