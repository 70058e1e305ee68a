"""The command line as a person types it, in this process."""

import sys

import pytest

from s3_megatron import cli


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Type ``s3-megatron`` with ``arguments``; gives the exit code."""
    monkeypatch.setattr(sys, "argv", ["s3-megatron", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)
