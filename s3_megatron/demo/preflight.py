"""What would end the demonstration after minutes is refused before it starts."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from s3_megatron import machine
from s3_megatron.demo.engines import Engine
from s3_megatron.errors import S3Error
from s3_megatron.jobs.progress import print_line

GIB = 2**30
# Seen on 2026-11-28, GiB resident: 1.2 in each of two ranks, 0.8 in this program, 0.5 in torchrun.
MEMORY = 4 * GIB
# Runs, corpus and the results of an earlier demonstration are 250 MB.
DISK = GIB
LOCK = ".demo.lock"


def check(engine: Engine, console: Console) -> None:
    """Warn of what only makes the demonstration slow.

    Raises:
        S3Error: there is too little memory, or a package that ``engine`` needs is missing.
    """
    for package in engine.packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise S3Error(f"{package} is not installed: make demo builds an environment that has it") from None
    memory = machine.available_memory()
    if memory < MEMORY:
        raise S3Error(
            f"{memory / GIB:.1f} GiB of memory are free, and the demonstration takes {MEMORY / GIB:.0f}: end other "
            "programs, or give this container more"
        )
    if machine.cores() == 1:
        print_line(console, "one core: its two ranks share it, and all takes about twice as long")


@contextmanager
def own_folder(runs: Path) -> Iterator[None]:
    """Keep ``runs``, which is made where it is missing, for this demonstration alone while the block runs.

    Raises:
        S3Error: another demonstration has it, or it cannot be written, or its disk is full.
    """
    try:
        runs.mkdir(exist_ok=True)
        (runs / LOCK).touch()  # FileLock takes a folder that cannot be written for one that is held (4.2.11)
        lock = FileLock(runs / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise S3Error(f"a demonstration runs in {runs.resolve()} already: wait for it, or end it") from None
    except FileExistsError:
        kind = "a link that leads nowhere" if runs.is_symlink() else "a file"
        raise S3Error(
            f"{runs.absolute()} is {kind}, and results belong into a folder of that name: remove it"
        ) from None
    except OSError as error:
        raise S3Error(f"{runs.absolute()} cannot be written: {error.strerror or error}") from error
    with lock:
        free = shutil.disk_usage(runs).free
        if free < DISK:
            raise S3Error(
                f"{free / GIB:.1f} GiB are free on the disk of {runs.absolute()}, and the demonstration writes up to "
                f"{DISK / GIB:.0f}: make room"
            )
        yield


def set_aside(folder: Path, console: Console) -> None:
    """Move the results of an earlier demonstration, whole or not, to ``FOLDER.previous``, replacing what is there."""
    if not os.path.lexists(folder):
        return
    previous = folder.with_name(f"{folder.name}.previous")
    if previous.is_dir() and not previous.is_symlink():
        shutil.rmtree(previous)
    else:
        previous.unlink(missing_ok=True)
    folder.rename(previous)
    print_line(console, f"the last demonstration is now in {previous}")
