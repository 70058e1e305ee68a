"""The ranks that tests start, forked or by torchrun: what they get, how they end, and what is printed of a hang."""

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import ranks as pool
from tests.agent import wait_for
from tests.launcher import settings, torchrun
from tests.ranks import ranks

pytestmark = pytest.mark.distributed

Start = Callable[..., subprocess.CompletedProcess[str]]

HANGS = """
import os, pathlib, sys, time
def stuck():
    time.sleep(600)
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
print("rank", os.environ["RANK"], "was here", flush=True)
if os.environ["RANK"] == "1":
    stuck()
while True:
    time.sleep(0.01)
"""


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def standing(text: str) -> dict[str, str]:
    """What is printed of each rank's place, by its number; skips where the kernel forbids to look."""
    found = dict(re.findall(r"^rank (\d): (.*?)(?=^rank|\Z)", text, flags=re.MULTILINE | re.DOTALL))
    if any("no stacks: " in stack for stack in found.values()):
        pytest.skip(f"py-spy may not read processes here: {found}")
    return found


def no_rank_is_left(folder: Path) -> None:
    """Of those that have left their process ids in ``folder``."""
    pids = [int((folder / name).read_text()) for name in ("0", "1")]
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_a_timeout_says_where_every_rank_was(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as hung:
        ranks([script(tmp_path, HANGS), str(tmp_path)], nproc=2, timeout=5)
    no_rank_is_left(tmp_path)
    assert "rank 0 was here" in hung.value.stdout and "rank 1 was here" in hung.value.stdout
    found = standing(hung.value.__notes__[0])
    assert "stuck (script.py:4)" in found["1"] and "stuck" not in found["0"]


def test_a_launch_may_take_as_long_as_its_ranks_print(tmp_path: Path) -> None:
    """The limit was for the whole launch, and 78 checks of Megatron's engine on 4 ranks took longer on a slow CPU."""
    text = "import time\nfor number in range(9):\n    print(number, flush=True)\n    time.sleep(1)"
    assert ranks([script(tmp_path, text)], nproc=1, timeout=6).stdout.endswith("8\n")


@pytest.mark.parametrize("start", [ranks, torchrun])
def test_whatever_stops_the_test_says_it_too_and_leaves_no_rank(
    tmp_path: Path, start: Start, listens_to_ctrl_c: None
) -> None:
    """pytest-timeout and Ctrl-C raise in the middle of the wait."""

    def interrupt() -> None:
        while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
            time.sleep(0.05)
        time.sleep(0.5)  # from the file to its next line
        os.kill(os.getpid(), 2)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as stopped:
        start([script(tmp_path, HANGS), str(tmp_path)], nproc=2, timeout=250)
    no_rank_is_left(tmp_path)
    found = standing(stopped.value.__notes__[0])
    assert "stuck (script.py:4)" in found["1"] and "stuck" not in found["0"]


@pytest.mark.parametrize("end", ["sys.exit(3)", "os.kill(os.getpid(), 9)", "raise ValueError('bad')"])
def test_a_rank_that_fails_ends_the_others_and_all_output_is_kept(tmp_path: Path, end: str) -> None:
    text = f"""
import os, sys, time
print("rank", os.environ["RANK"], "was here", flush=True)
time.sleep(0.2)
if os.environ["RANK"] == "1":
    {end}
time.sleep(600)
"""
    done = ranks([script(tmp_path, text)], nproc=3, timeout=250)
    assert done.returncode == {"s": 3, "o": -9, "r": 1}[end[0]]
    assert done.stdout == "".join(f"[rank {rank}]\nrank {rank} was here\n" for rank in (0, 2, 1)), "the culprit last"
    assert ("ValueError: bad" in done.stderr) == end.startswith("raise")


def test_a_rank_that_fails_before_it_writes_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a FileNotFoundError of its output: Megatron-LM's folder `tests` stood before ours on PYTHONPATH."""
    monkeypatch.setattr(pool, "_be_rank", os.getcwd)  # which takes no arguments
    done = ranks(["script.py"], nproc=1, timeout=250)
    assert (done.returncode, done.stdout) == (1, "[rank 0]\n")


def test_a_rank_is_as_torchrun_makes_it_but_has_imported_its_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread, no GPU, this process's environment of now, and nothing of S3 in Megatron or DeepSpeed."""
    monkeypatch.setenv("SET_BY_A_TEST", "1")
    text = """
import multiprocessing, os, sys
threads = len(os.listdir("/proc/self/task"))
hosts = sorted({"megatron.training.training", "deepspeed"} & set(sys.modules))
import json, torch, torch.distributed as dist
from s3_megatron.engines import imports
from s3_megatron import rehearsal
dist.init_process_group("gloo")
mine = {
    "argv": sys.argv[1:], "hosts": hosts, "omp": torch.get_num_threads(), "path": sys.path[0], "threads": threads,
    "environment": [os.environ.get(name) for name in ("SET_BY_A_TEST", "GIVEN", "CUDA_VISIBLE_DEVICES", "RANK")],
    "starts": multiprocessing.get_start_method() == multiprocessing.get_all_start_methods()[0],  # python's default
    "activated": rehearsal.activation._undo is not None,
    "s3": [name for name in sys.modules if name.startswith("s3_megatron.engines.")],
}
print(json.dumps(mine))
dist.destroy_process_group()
"""
    done = ranks([script(tmp_path, text), "an argument"], nproc=2, timeout=250, env={"GIVEN": "2"})
    assert done.returncode == 0, done.stderr
    for rank, line in enumerate(done.stdout.splitlines()[1::2]):
        assert json.loads(line) == {
            "argv": ["an argument"],
            "hosts": ["deepspeed", "megatron.training.training"],
            "omp": 1,
            "path": str(tmp_path),
            "threads": 2,  # and the one that ends a rank whose pytest was killed
            "environment": ["1", "2", "", str(rank)],
            "starts": True,
            "activated": False,
            "s3": ["s3_megatron.engines.imports"],
        }


def test_another_path_needs_ranks_that_import_for_themselves() -> None:
    with pytest.raises(ValueError, match="torchrun"):
        ranks(["script.py"], nproc=1, timeout=1, env={"PYTHONPATH": "/elsewhere"})


def test_a_server_that_could_not_import_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library's fork server swallows ImportError: ranks were right, and as slow as before."""
    monkeypatch.setattr(pool, "_PRELOADED", "tests.nowhere")
    with pytest.raises(ModuleNotFoundError, match=r"tests\.nowhere"):
        pool.preloaded_path()
    monkeypatch.setattr(pool, "_PRELOADED", "this")
    with pytest.raises(AssertionError, match="has not imported this"):
        pool.preloaded_path()


def test_a_rank_does_not_outlive_a_pytest_that_was_killed(tmp_path: Path) -> None:
    """One that hung would be there for ever."""
    command = [script(tmp_path, HANGS), str(tmp_path)]
    rank = pool._start(command, {**settings(None), "RANK": "1"}, tmp_path / "output")
    wait_for((tmp_path / "1").exists)
    rank._popen.finalizer()  # type: ignore[attr-defined]  # closes this side of its pipe, as the kernel would
    wait_for(lambda: not psutil.pid_exists(rank.pid or 0))
