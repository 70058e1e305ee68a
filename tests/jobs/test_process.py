"""Starting, following, killing and ending a run, with a stand-in for torchrun."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from s3_megatron.errors import S3Error
from s3_megatron.jobs.process import Training
from tests.terminal import lives

# Starts two "ranks" in sessions of their own, as torchrun does, each with a helper process, and fails when one rank
# ends. SIGTERM ends the ranks unless they are deaf to it; nothing signals the helpers.
STAND_IN = """
import os, signal, subprocess, sys
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if "deaf" in sys.argv else ""
helper = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
rank = deaf + helper + "print('up', flush=True); time.sleep(60)"
ranks = [subprocess.Popen([sys.executable, "-c", rank], env={**os.environ, "RANK": str(i)}, start_new_session=True)
         for i in (1, 0)]
def end(*_):
    for process in ranks: process.terminate()
    for process in ranks: process.wait()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
while all(process.poll() is None for process in ranks):
    signal.sigtimedwait([], 0.05)
print("ValueError: rank %d is gone" % [p.poll() is None for p in ranks].index(False))
end()
"""


def start(folder: Path, *args: str) -> tuple[Training, list[psutil.Process]]:
    training = Training([sys.executable, "-c", STAND_IN, *args], folder, os.environ)
    deadline = time.monotonic() + 150
    while training.log.read_text().count("up") < 2:
        assert time.monotonic() < deadline, training.log.read_text()
        time.sleep(0.05)
    return training, psutil.Process(training.pid).children(recursive=True)


def test_the_last_rank_is_killed_and_the_log_says_why_the_run_ended(tmp_path: Path):
    """A killed rank's helper, which Megatron had started to write a checkpoint, once stayed for ever."""
    training, family = start(tmp_path)
    with training:
        training.kill_last_rank()
        assert list(training.events()) == []
        with pytest.raises(S3Error, match=r"status 1: ValueError: rank 0 is gone \(whole log: .*job.log\)"):
            training.check("training")  # rank 1 is the first child of the stand-in
    assert not any(map(lives, family))


@pytest.mark.parametrize("manner", ["obedient", "deaf"])
def test_an_interrupted_run_leaves_no_process(tmp_path: Path, manner: str, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C: the ranks live in sessions of their own, so nothing but this code ends them."""
    monkeypatch.setattr("s3_megatron.jobs.process.PATIENCE", 1)
    training, family = start(tmp_path, manner)
    with pytest.raises(KeyboardInterrupt), training:
        raise KeyboardInterrupt
    assert len(family) == 5, "the command, its ranks and their helpers, below the guard"
    assert not any(map(lives, family)) and not psutil.pid_exists(training.pid)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            ["[local_rank0]:[rank0]: ValueError: a peer is gone", "attempt: failed on n1: ended by SIGKILL"],
            "ended by SIGKILL",
        ),
        (["[local_rank0]:[rank0]: ValueError: why", "[local_rank1]:[rank1]: ValueError: why"], "ValueError: why"),
        (["out of", "", "words"], "out of / words"),
    ],
)
def test_the_first_failure_is_the_reason(tmp_path: Path, lines: list[str], reason: str):
    """The node agent knows which it was; of ranks without one, what all report is printed once."""
    with Training(["sh", "-c", 'printf "%s\\n" "$@"; exit 5', "-", *lines], tmp_path, os.environ) as training:
        with pytest.raises(S3Error, match=rf"training ended with status 5: {reason} \(whole log"):
            training.check("training")
