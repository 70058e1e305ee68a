"""Starting ranks as a person does, and reading what Megatron prints."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from s3_megatron.jobs.node import processes, watchdog

ROOT = Path(__file__).parents[1]


def settings(env: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of a rank without GPUs and with one thread; ``env`` comes on top."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **threads, **(env or {})}


def torchrun(
    args: Sequence[str], nproc: int, timeout: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun --nproc_per_node nproc args`` on a free port. Where only ranks are wanted, tests/ranks.py is fast.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds; every rank is killed. What was printed is in it, and
            where every rank was.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc), *args]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=settings(env), stdout=pipe, stderr=pipe, text=True) as agent:
        try:
            stdout, stderr = agent.communicate(timeout=timeout)
        except BaseException as stop:
            stop.add_note(where(processes.ranks(agent.pid)))
            kill_tree(agent.pid)
            if isinstance(stop, subprocess.TimeoutExpired):
                stop.output, stop.stderr = agent.communicate()
                stop.add_note(f"last lines:\n{stop.output[-2000:]}\n{stop.stderr[-4000:]}")
            raise
    return subprocess.CompletedProcess(command, agent.returncode, stdout, stderr)


def where(ranks: Iterable[processes.Rank]) -> str:
    """Where every rank stands: pytest-timeout shows the test's own process alone."""
    return "\n".join(f"rank {rank.rank}: {watchdog.dump(rank)}" for rank in ranks) or "no rank is left"


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants: torchrun gives every rank a session, so no process group holds them all."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (*root.children(recursive=True), root):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


_LINE = re.compile(r"iteration +(\d+)/ *\d+ \|(?:.*? lm loss: ([^ ]+) \|)?")


def losses(stdout: str) -> dict[int, float]:
    """Read the loss of every logged iteration that was not skipped from one run's output; 6 decimals are printed.

    megatron-core 0.19.2 does not reset its sums after a run's first iteration, so with --log-interval 1 the second
    line shows the mean of two iterations; here it is turned back into the second one's own, to about 2e-6.
    """
    lines = [(int(iteration), float(loss) if loss else None) for iteration, loss in _LINE.findall(stdout)]
    seen = {iteration: loss for iteration, loss in lines if loss is not None}
    (first, one), (second, mean) = [*lines, (0, None), (0, None)][:2]
    if second == first + 1 and one is not None and mean is not None:
        seen[second] = 2 * mean - one
    return seen
