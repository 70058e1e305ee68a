"""The command line as a person types it, in this process, and what it has left behind."""

import sys

import psutil
import pytest

from s3_megatron import cli


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Type ``s3-megatron`` with ``arguments``; gives the exit code."""
    monkeypatch.setattr(sys, "argv", ["s3-megatron", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def lives(process: psutil.Process) -> bool:
    """Whether it still runs; an orphan that ended stays a zombie until init looks after it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
