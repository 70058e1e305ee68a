"""Noticing that training stands still, and writing down where."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from s3_megatron.files import write_file
from s3_megatron.jobs.node.processes import Rank, ranks
from s3_megatron.machine import node_name
from s3_megatron.run_folder import Attempt

_DUMP_SECONDS = 30.0
_WAIT_FOR_OTHERS_SECONDS = 30.0


class Watchdog:
    """Watches a file that training appends to: the metrics, one line a logged iteration."""

    def __init__(self, heartbeat: Path, start_seconds: float, hang_seconds: float) -> None:
        """Allow ``start_seconds`` to the first sign of life from now, and ``hang_seconds`` between any two."""
        self._heartbeat = heartbeat
        self._allowed, self._hang_seconds = start_seconds, hang_seconds
        self._seen = self._look()
        self._since = time.monotonic()

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._heartbeat.stat()
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns

    def silence(self) -> float | None:
        """Give the seconds without a sign of life if they are too many."""
        now, seen = time.monotonic(), self._look()
        if seen != self._seen:
            self._seen, self._since, self._allowed = seen, now, self._hang_seconds
        silent = now - self._since
        return silent if silent > self._allowed else None


def dump_ranks(torchrun: int, attempt: Attempt) -> int:
    """Write where every rank below the process ``torchrun`` stands to ``attempt.hang``; returns how many there are.

    Then waits for the other nodes to have done so: this one's end would kill them.
    """
    folder, found = attempt.hang, ranks(torchrun)
    with ThreadPoolExecutor(max_workers=max(len(found), 1)) as pool:
        for rank, text in zip(found, pool.map(dump, found), strict=True):
            write_file(folder / f"{node_name()}-rank{rank.rank}.txt", text.encode())
    write_file(folder / f"{node_name()}.dumped", b"")
    end = time.monotonic() + _WAIT_FOR_OTHERS_SECONDS
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    while len(list(folder.glob("*.dumped"))) < nodes and time.monotonic() < end:
        time.sleep(0.5)
    return len(found)


def dump(rank: Rank) -> str:
    """Describe what ``rank`` does: its state in the kernel and its Python stacks, or why py-spy gives none."""
    try:
        status = rank.process.status()
    except psutil.Error:
        return "the process has ended\n"
    text = f"state: {status} (stopped: SIGSTOP; disk-sleep: waits for a device or a file server)\n"
    beside = shutil.which("py-spy", path=sysconfig.get_path("scripts")) or shutil.which("py-spy")
    if beside is None:
        return text + "no stacks: py-spy is not installed (pip install py-spy)\n"
    # --nonblocking: otherwise it stops the process first, and waits for ever for one that is stopped already.
    command = [beside, "dump", "--pid", str(rank.process.pid), "--nonblocking"]
    for _ in range(3):  # a process that runs may change while it is read
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=_DUMP_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return text + f"no stacks: py-spy did not answer in {_DUMP_SECONDS:.0f} s\n"
        if done.returncode == 0:
            return text + done.stdout
    print(f"py-spy: {done.stderr.strip()}", file=sys.stderr)
    return text + f"no stacks: {done.stderr.strip()}\n"
