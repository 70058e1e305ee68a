"""A run that is launched here: what it prints, and the signals that reach it or do not."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from s3_megatron.jobs import logs, submit
from s3_megatron.jobs.node.agent import Agent
from tests.jobs.run_folders import make

pytestmark = pytest.mark.usefixtures("state_folder")


def test_what_a_local_run_prints_is_printed_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = make(tmp_path)
    for _ in range(2):
        run.script.write_text("echo trains; echo fails >&2; exit 3\n")
        assert submit.start(run) == 3
    assert capfd.readouterr().out == "trains\nfails\n" * 2
    assert list(logs.lines(run, follow=False)) == ["job: trains", "job: fails"] * 2


def test_a_launch_on_a_node_of_a_job_is_no_part_of_the_job(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shell on a job's second node the agent left the folder's lease to the first: two launches trained in one."""
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ${SLURM_NODEID-none} ${SLURM_JOB_ID-none}\n")
    python.chmod(0o755)
    assert submit.start(make(tmp_path, "first", f"cluster.python={python}")) == 0
    assert capfd.readouterr().out == "none none\n"


# A script that says what reaches it, as a node agent that saves and ends would.
LISTENS = """trap 'echo asked; exit 143' TERM INT
echo trains
touch "$0.trains"
for _ in {1..600}; do sleep 0.1; done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_launch_that_is_asked_to_end_asks_its_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """``timeout 560 s3-megatron launch`` ended alone: agent, torchrun and ranks trained on without a terminal.

    After Ctrl-C what the agent said of the end was not read.
    """
    run = make(tmp_path)
    run.script.write_text(LISTENS)

    def ask() -> None:
        while not run.script.with_name(f"{run.script.name}.trains").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_DFL)  # under nohup these tests ignore SIGHUP
    try:
        asking = threading.Thread(target=ask)
        asking.start()
        assert submit.start(run) == 143
        asking.join()
        assert capfd.readouterr().out == "trains\nasked\n"
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_launch_that_is_asked_while_it_starts_its_run_asks_it_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a loaded machine SIGHUP met a launch whose script ran and whose handlers were not there: it ended alone."""
    run = make(tmp_path)
    run.script.write_text(LISTENS)

    class Asked(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            while not run.script.with_name(f"{run.script.name}.trains").exists():
                time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Asked)
    assert submit.start(run) == 143
    assert capfd.readouterr().out == "trains\nasked\n"


def test_nohup_keeps_a_launch_and_its_agent_from_the_terminals_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent listened to SIGHUP again: a run under nohup ended with the terminal."""
    run = make(tmp_path)
    run.script.write_text("trap '' HUP; kill -HUP $PPID; echo trains\n")
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert submit.start(run) == 0
        agent = Agent(run.path, "local-1", 1, 1)
        monkeypatch.setattr(Agent, "_train", lambda *_: 0)
        monkeypatch.setattr("s3_megatron.jobs.node.agent.adopt_orphans", lambda: None)  # of pytest itself
        monkeypatch.setenv("SLURM_NODEID", "1")
        assert agent.main(["true"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == agent._remember
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_terminal_that_is_gone_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``launch | head`` the run's own prints failed, and with them the run."""
    run = make(tmp_path)
    run.script.write_text("echo one; echo two\n")

    class Gone:
        class buffer:
            @staticmethod
            def write(_: bytes) -> int:
                raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone)
    assert submit.start(run) == 0
    assert run.job_log.read_text() == "one\ntwo\n"


def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On a full disk ``launch`` ended with a traceback, and the run of its next print into a pipe without a reader."""
    run = make(tmp_path)
    run.script.write_text("for i in {1..500}; do echo line $i; done; exit 3\n")
    run.job_log.symlink_to("/dev/full")
    assert submit.start(run) == 3
    assert capfd.readouterr().out.endswith("line 499\nline 500\n")
