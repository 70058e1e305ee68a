"""One run at a time in a folder of checkpoints: two would train over each other, and each spoil the other's saves."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from s3_megatron.errors import S3Error
from s3_megatron.files import write_file

if TYPE_CHECKING:
    from filelock import BaseFileLock

# How long a holder on another machine may be silent, in seconds: file servers show a change after up to 60.
LEASE_SECONDS = 120.0
# Files of the folder; the batch script has these names, too.
LEASE, HOLDER = "lease", "holder"


class FolderIsHeld(S3Error):
    """Another run has the folder."""


@contextmanager
def held(folder: Path, lost: Callable[[str], None]) -> Iterator[None]:
    """Hold ``folder`` while the body runs; calls ``lost`` from another thread with a line if another process takes it.

    A holder of this machine that has ended keeps nothing; nor does an earlier start of the same SLURM job. One on
    another machine is waited for until it has not refreshed its claim for LEASE_SECONDS. ``folder/holder`` names the
    holder: job-restart or "-", host, process, time, and SLURM's cluster, if it is one's.

    Raises:
        FolderIsHeld: another run has the folder.
        S3Error: it cannot be written, or filelock is not installed.
    """
    try:
        from filelock import FileLock
    except ModuleNotFoundError:  # pip install --no-deps
        raise S3Error(f"filelock is not installed for {sys.executable}: pip install filelock") from None

    try:
        from filelock import LeaseCompromise, SoftFileLease
    except ImportError:  # NVIDIA's container pins an older one
        lock = FileLock(folder / "lock", timeout=2)
        with _taken(lock, folder):
            if lock.is_locked:
                print(
                    "filelock before 3.30 has no leases: a second run in this folder is noticed on this machine, and "
                    "on others if its file system passes locks on",
                    file=sys.stderr,
                )
            yield
        return

    def compromised(loss: LeaseCompromise) -> None:
        if loss.reason == "owner-changed":
            lost(f"{folder} is no longer this run's: {_holder(folder)} has it")

    _, where, *_ = [*_words(folder), "-", "-"]
    lease = SoftFileLease(
        folder / LEASE,
        timeout=2 if where == platform.node() else LEASE_SECONDS + 5,
        poll_interval=0.5,
        lease_duration=LEASE_SECONDS,
        on_compromise=compromised,
        thread_local=False,
    )
    with _taken(lease, folder):
        yield


@contextmanager
def _taken(lock: "BaseFileLock", folder: Path) -> Iterator[None]:
    """Hold ``folder`` by ``lock``: a lease, or a lock of the kernel, which a process that ends gives back.

    Raises:
        FolderIsHeld: another run has the folder.
        S3Error: it cannot be written.
    """
    from filelock import Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _is_of_an_earlier_start(folder):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.acquire()
    except Timeout as error:
        raise FolderIsHeld(f"{folder} is held by {_holder(folder)}: one run at a time") from error
    except NotImplementedError:  # what filelock makes of ENOSYS
        print(f"{folder} cannot be locked: a second run in this folder would not be noticed", file=sys.stderr)
    except OSError as error:
        raise S3Error(f"{folder} cannot be held: {error.strerror or error}") from error
    try:
        cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
        words = (_start(), platform.node(), str(os.getpid()), time.strftime("%F %T"), cluster)
        write_file(folder / HOLDER, f"{' '.join(words).rstrip()}\n".encode())
        yield
    finally:
        lock.release()


def _start() -> str:
    """Give the job and which of its starts this is; "-" where there is none."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else "-"


def _is_of_an_earlier_start(folder: Path) -> bool:
    """Whether the holder is this SLURM job as it was before it was requeued, which SLURM has ended."""
    before, start = [*_words(folder), "-"][0], _start()
    job = start.rpartition("-")[0]
    return bool(job) and before != start and before.rpartition("-")[0] == job


def _words(folder: Path) -> list[str]:
    try:
        return (folder / HOLDER).read_text(encoding="utf-8").split()
    except OSError:  # none yet; or what it is held by cannot be read, nor then be taken
        return []


def _holder(folder: Path) -> str:
    """Name who has ``folder``."""
    if len(words := _words(folder)) < 5:
        return "a run that has not written its name yet"
    start, host, pid, day, clock, *cluster = words
    job = f"job {' of '.join([start, *cluster])}, "
    return f"{'' if start == '-' else job}process {pid} on {host} since {day} {clock}"
