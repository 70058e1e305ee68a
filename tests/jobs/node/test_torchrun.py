"""Which rank failed first, as torchrun's launcher reports it; test_training.py starts it for real."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from s3_megatron.jobs.node import torchrun, verdict

SECOND = int(time.time())


def failure(folder: Path, rank: int, exitcode: int, message: str | None = None, at: float = 0) -> ProcessFailure:
    """A rank that wrote its exception ``at`` seconds after one second began, or that wrote none."""
    path = folder / f"error-{rank}.json"
    if message is not None:
        path.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": str(SECOND)}}}))
        os.utime(path, (SECOND + at, SECOND + at))
    return ProcessFailure(local_rank=rank, pid=9, exitcode=exitcode, error_file=str(path))


def failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *failures: ProcessFailure
) -> tuple[int, list[dict[str, Any]]]:
    """Let torchrun end with ``failures``, of ranks that are 4 more than the local ones."""

    def run_and_fail(_args: object) -> None:
        raise ChildFailedError("script.py", {4 + failure.local_rank: failure for failure in failures})

    monkeypatch.setattr(run, "run", run_and_fail)
    monkeypatch.setattr("sys.argv", ["torchrun", "script.py"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("S3_FAILURES", str(folder / "failures.json"))
    with pytest.raises(SystemExit) as stop:
        torchrun.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code, json.loads((folder / "failures.json").read_text())


def test_the_first_of_a_second_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchelastic's times have whole seconds, so that rank 0's broken connection was as early as its cause."""
    lost = failure(tmp_path, 0, 1, "RuntimeError: connection closed by peer", at=0.6)
    cause = failure(tmp_path, 1, 2, "S3Error: there is no model 'x': give another", at=0.5)
    code, report = failed(tmp_path, monkeypatch, lost, cause)
    assert code == 2, "a configuration error"
    assert [one["rank"] for one in report] == [5, 4]
    assert report[0]["message"] == "there is no model 'x': give another"
    assert report[1]["message"] == "RuntimeError: connection closed by peer"

    cause = failure(tmp_path, 1, 1, "OSError: a disk\nis full", at=0.5)
    code, report = failed(tmp_path, monkeypatch, lost, cause)
    assert (code, report[0]["message"]) == (1, "OSError: a disk")


def test_a_killed_rank_comes_before_what_came_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no file, so that its time is when torchrun looked, after the others had written theirs."""
    lost = failure(tmp_path, 0, 1, "RuntimeError: connection closed by peer", at=int(time.time()) - SECOND)
    code, report = failed(tmp_path, monkeypatch, lost, failure(tmp_path, 1, -9), failure(tmp_path, 2, -15))
    assert code == 1
    assert (report[0]["signal"], report[0]["message"]) == ("SIGKILL", "ended by SIGKILL")
    assert report[-1]["signal"] == "SIGTERM", "torchrun sends it to those that are left"


def test_bad_nodes_keep_their_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, report = failed(tmp_path, monkeypatch, failure(tmp_path, 0, 3))
    assert (code, report[0]["message"]) == (3, "ended with exit code 3; its log has the reason")


LATE = """
import os, signal
from s3_megatron.errors import S3Error
from s3_megatron.train.entry import one_line_errors
signal.signal(signal.SIGTERM, lambda *_: None)
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        print("sent", flush=True)
late = Late()
with one_line_errors():
    {body}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("raise S3Error('--lr is -1')", 2)])
def test_a_sigterm_in_the_last_moment_changes_no_exit_code(body: str, code: int) -> None:
    """A pre-empted rank had saved and was on its way out when the agent's own SIGTERM came: Python had given up the
    handler by then, the rank "failed" of signal 15, and its node's verdict was that nothing had been saved.

    And two ranks refused the same flag: rank 1 wrote it down first, rank 0 ended first, and torchrun's SIGTERM ended
    rank 1. The first failure then was no configuration error, and the job was requeued to fail again.
    """
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "a rank"}
    command = [sys.executable, "-c", LATE.format(body=body)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (code, "sent\n"), done.stderr


@pytest.mark.distributed
def test_a_port_that_something_else_holds_ends_the_start_at_once() -> None:
    """torchrun became a client of whatever had taken its port, and waited there until the job's hour was over.

    By the old name, which scripts that were queued before the move have; test_training.py has the new one.
    """
    with socket.create_server(("", 0)) as holder:
        endpoint = f"localhost:{holder.getsockname()[1]}"
        command = ["-m", "s3_megatron.train.torchrun", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=a"]
        command += ["--rdzv-conf=join_timeout=60", f"--rdzv-endpoint={endpoint}", "--no-python", "true"]
        environ = {**os.environ, "SLURM_NODEID": "0"}
        done = subprocess.run([sys.executable, *command], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "RendezvousConnectionError" in done.stderr, done.stderr[-2000:]


def test_what_ends_torchrun_itself_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose own name does not resolve waited ten minutes for "did not say why": torchrun had raised."""

    def no_rendezvous(_args: object) -> None:
        raise ConnectionError("the client socket has timed out\nafter 600000ms")

    monkeypatch.setattr(run, "run", no_rendezvous)
    monkeypatch.setattr("sys.argv", ["torchrun", "script.py"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("S3_FAILURES", str(tmp_path / "failures.json"))
    with pytest.raises(ConnectionError):
        torchrun.main()
    first = verdict.first_failure(tmp_path / "failures.json")
    assert first is not None and first["rank"] is None
    assert first["message"] == "torchrun: ConnectionError: the client socket has timed out"
