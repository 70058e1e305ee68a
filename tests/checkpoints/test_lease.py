"""One run at a time in a folder."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s3_megatron.checkpoints import lease
from s3_megatron.checkpoints.lease import FolderIsHeld, held
from s3_megatron.errors import S3Error

HOLD = """
import sys, time
from pathlib import Path
from s3_megatron.checkpoints.lease import held
with held(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path, **environ: str) -> subprocess.Popen[str]:
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    other = subprocess.Popen(command, env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def test_the_second_is_refused_with_the_name_of_the_first_and_the_dead_keep_nothing(tmp_path: Path) -> None:
    """Two runs in one folder both trained, iterations interleaved, and a rank died of a vanished temporary file."""
    folder = tmp_path / "checkpoints"
    other = holder(folder)
    try:
        with pytest.raises(FolderIsHeld, match=rf"held by process {other.pid} on \S+ since 20") as refused:
            with held(folder, print):
                pytest.fail("it is held")
        assert "\n" not in str(refused.value)
    finally:
        other.kill()
        other.wait()
    started = time.monotonic()
    with held(folder, print):
        assert time.monotonic() - started < 30, "SIGKILL left the lease, and its process is gone"
    with held(folder, print):
        pass  # released


def test_a_requeued_job_takes_over_from_its_own_start_that_runs_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that loses its network goes on training while SLURM has started the job anew elsewhere."""
    other = holder(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0", SLURM_CLUSTER_NAME="alpha")
    try:
        for count, mine in (("0", False), ("1", True)):
            monkeypatch.setenv("SLURM_JOB_ID", "7")
            monkeypatch.setenv("SLURM_RESTART_COUNT", count)
            if mine:
                with held(tmp_path, print):
                    assert (tmp_path / "holder").read_text().startswith("7-1 ")
            else:
                with pytest.raises(FolderIsHeld, match="held by job 7-0 of alpha, process"), held(tmp_path, print):
                    pytest.fail("two commands in one allocation are two runs")
    finally:
        other.kill()
        other.wait()


def test_who_has_lost_the_folder_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    messages: list[str] = []
    with held(tmp_path, messages.append):
        (tmp_path / "other").write_text("another's")
        (tmp_path / "other").replace(tmp_path / "lease")
        limit = time.monotonic() + 20
        while not messages and time.monotonic() < limit:
            time.sleep(0.05)
    assert len(messages) == 1 and "is no longer this run's" in messages[0]


# Names are looked up when they are first asked for.
def test_a_holders_name_that_cannot_be_read_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read before anything refuses in one line: a stale file handle ended the node's agent in a traceback."""

    def stale(*_: object, **__: object) -> str:  # root may read everything, and no file system here goes stale
        raise OSError(errno.ESTALE, "Stale file handle")

    (tmp_path / "holder").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", stale)
        with held(tmp_path, print):
            pass
    assert (tmp_path / "holder").read_text()


WITHOUT_LEASES = """
import filelock
vars(filelock).pop("SoftFileLease", None)
del filelock.__getattr__
"""


def test_a_filelock_without_leases_still_keeps_a_second_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NVIDIA's container pins one before 3.30: a line warned that a second run would not be noticed, and it was not."""
    from filelock import FileLock, SoftFileLease, Timeout  # noqa: F401  (now they are known, and stay so but for the second)

    monkeypatch.setattr(sys.modules[__name__], "HOLD", "from filelock import FileLock, Timeout" + WITHOUT_LEASES + HOLD)
    monkeypatch.delattr("filelock.__getattr__")
    monkeypatch.delattr("filelock.SoftFileLease")
    folder = tmp_path / "checkpoints"
    other = holder(folder)
    try:
        with pytest.raises(FolderIsHeld, match=rf"held by process {other.pid} on \S+ since 20"), held(folder, print):
            pytest.fail("it is held")
    finally:
        other.kill()
        other.wait()
    with held(folder, print):
        assert "is noticed on this machine" in capsys.readouterr().err
    with held(folder, print):
        pass  # released
    other = holder(folder, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0")
    try:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with held(folder, print):  # its own earlier start
            assert (folder / "holder").read_text().startswith("7-1 ")
    finally:
        other.kill()
        other.wait()
    (tmp_path / "file").touch()
    with pytest.raises(S3Error, match="cannot be held: "), held(tmp_path / "file", print):
        pytest.fail("it is a file")

    def unsupported(_: FileLock) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    with held(folder, print):
        assert "would not be noticed" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(S3Error, match=r"cannot be held: (Not a directory|File exists)"):
        with held(tmp_path / "file", print):
            pytest.fail("it is a file")


def test_a_missing_filelock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After pip install --no-deps a start was a traceback of the node's agent."""
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(S3Error, match=r"filelock is not installed for .*: pip install filelock"), held(tmp_path, print):
        pass
