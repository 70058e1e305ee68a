"""The processes below a node's agent."""

import contextlib
import ctypes
import os
import sys
import time
from dataclasses import dataclass

import psutil


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own, so that none escapes ``kill_descendants``.

    prctl(PR_SET_CHILD_SUBREAPER): a rank's helpers, as those that write checkpoints, outlive its SIGKILL.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def kill_descendants(patience: float = 30) -> None:
    """Kill and reap whatever is left below this process.

    Waits at most ``patience`` seconds: a process that waits for a broken device or file server cannot be killed.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end and (left := psutil.Process().children(recursive=True)):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.05)


@dataclass(frozen=True)
class Rank:
    """A process that torchrun started."""

    rank: int
    process: psutil.Process


def ranks(torchrun: int) -> list[Rank]:
    """Find the ranks among the children of the process ``torchrun``: torchrun puts RANK into their environment."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(torchrun).children():
            with contextlib.suppress(psutil.Error, KeyError, ValueError):
                found.append(Rank(int(child.environ()["RANK"]), child))
    return found
