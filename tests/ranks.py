"""Ranks for tests, forked from one process that has imported torch, Megatron and DeepSpeed already.

A rank starts in 0.05 s of CPU, where its own imports take 6. What a fork hides is left to the tests that start a real
torchrun (tests/launcher.py): an entry's own imports, torchrun's signals and exit codes, another PYTHONPATH, and the
order of Python's sets, which is the same in all forked ranks.
"""

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from unittest.mock import patch

import psutil
from torch.distributed import TCPStore

from s3_megatron.jobs.node.processes import Rank
from tests.launcher import kill_tree, settings, where

_PRELOADED = "tests.preloaded"
_FORKS = multiprocessing.get_context("forkserver")
# A child imports its parent's main module, pytest's; and it finds what it is to do here.
_FORKS.set_forkserver_preload([_PRELOADED, "pytest", __name__])
_LOOK = 1.0  # seconds between looks at what is printed
_PATIENCE = 10.0  # seconds that the others have to end by SIGTERM when one has failed


def ranks(
    args: Sequence[str], nproc: int, timeout: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``nproc`` ranks of ``python args``, which are a script's path, or -m and a module, and what it is given.

    As under torchrun, ranks have no GPU and one thread, the others are ended when one fails, and the exit code is
    that one's. The output has every rank's part below a line that names it, a failed one's last.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds in which no rank has printed anything; every rank is
            killed. What was printed is in it, and where every rank was.
    """
    if "PYTHONPATH" in (env or {}):
        raise ValueError("a forked rank has imported its hosts already: torchrun() takes another PYTHONPATH")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port, as torchrun's own
    common = settings(env) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
    }
    with TemporaryDirectory() as name:
        started: list[ForkServerProcess] = []
        try:
            for rank in range(nproc):
                own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(_start(list(args), own, Path(name, str(rank))))
            failed = _wait(started, Path(name), timeout)
            if failed is None and any(process.is_alive() for process in started):
                raise subprocess.TimeoutExpired(list(args), timeout)
        except BaseException as stop:
            stop.add_note(where(Rank(i, psutil.Process(p.pid)) for i, p in enumerate(started) if p.is_alive()))
            _kill(started)
            if isinstance(stop, subprocess.TimeoutExpired):
                stop.output, stop.stderr = _printed(Path(name), range(nproc))
                stop.add_note(f"last lines:\n{stop.output[-2000:]}\n{stop.stderr[-4000:]}")
            raise
        code = 0 if failed is None else started[failed].exitcode or 1
        order = sorted(range(nproc), key=lambda rank: rank == failed)
        return subprocess.CompletedProcess(list(args), code, *_printed(Path(name), order))


def _start(args: list[str], environment: dict[str, str], output: Path) -> ForkServerProcess:
    """Fork a rank; the first one starts the server, whose environment is that of a rank without a test's own."""
    for kind in ("out", "err"):
        output.with_suffix(f".{kind}").touch()  # a rank that fails before it opens them is not a file that is missing
    process = _FORKS.Process(target=_be_rank, args=(args, environment, output))
    with patch.dict(os.environ, {**settings(None), "DS_ACCELERATOR": "cpu"}):
        process.start()
    return process


def _wait(started: Sequence[ForkServerProcess], folder: Path, timeout: float) -> int | None:
    """Wait until every rank has ended, or none prints any more; where one fails, end the others and return its number.

    A limit for all that a launch does would be one for the machine's speed: 78 checks took 500 s on a slow one.
    """
    size, end = 0, monotonic() + timeout
    while running := [process.sentinel for process in started if process.is_alive()]:
        connection.wait(running, min(_LOOK, timeout))
        for number, process in enumerate(started):
            if process.exitcode:
                for other in started:
                    other.terminate()
                late = monotonic() + _PATIENCE
                for other in started:
                    other.join(max(late - monotonic(), 0))
                _kill(started)
                return number
        printed = sum(path.stat().st_size for path in folder.iterdir())
        if printed > size:
            size, end = printed, monotonic() + timeout
        elif monotonic() > end:
            return None
    # The last one may have failed between the look at exit codes and the one at who runs.
    return next((number for number, process in enumerate(started) if process.exitcode), None)


def _kill(started: Sequence[ForkServerProcess]) -> None:
    for process in started:
        if process.is_alive() and process.pid is not None:
            kill_tree(process.pid)
        process.join()


def _printed(folder: Path, order: Iterable[int]) -> tuple[str, str]:
    """What the ranks wrote to stdout and to stderr."""
    stdout, stderr = (
        "".join(f"[rank {rank}]\n{(folder / f'{rank}.{kind}').read_text(errors='replace')}" for rank in order)
        for kind in ("out", "err")
    )
    return stdout, stderr


def _be_rank(args: list[str], environment: dict[str, str], output: Path) -> None:
    """What a forked process does: run a module or a script as python does."""
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(output.with_suffix(f".{kind}"), os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # python's own for what the rank starts, not a fork server
    threading.Thread(target=_end_with_pytest, daemon=True).start()
    sys.path[:] = preloaded_path()
    if args[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(args[0]).resolve().parent), args
        runpy.run_path(args[0], run_name="__main__")


def preloaded_path() -> list[str]:
    """Python's path as the server had it; an error where it has imported nothing, which it passes over in silence."""
    if _PRELOADED in sys.modules:
        return list(sys.modules[_PRELOADED].PATH)
    importlib.import_module(_PRELOADED)  # raises what the server did not show
    raise AssertionError(f"the fork server has not imported {_PRELOADED}, so every rank would, for seconds")


def _end_with_pytest() -> None:
    """A rank that hangs must not outlive a pytest that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
