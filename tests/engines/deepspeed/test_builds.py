"""Locks of torch's builds of extensions, those of killed ones among them."""

import os
import threading
import time
from pathlib import Path

import pytest

from s3_megatron.bench import builds


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    made = tmp_path / "cpu_adam" / "lock"
    made.parent.mkdir()
    made.touch()
    return made


def test_a_killed_builds_lock_is_removed(lock: Path) -> None:
    """A build of DeepSpeedCPUAdam had been killed: its lock stayed, and `bench step` waited for it for ever."""
    old = time.time() - 21 * 60
    os.utime(lock, (old, old))
    builds.prepare("cpu_adam")
    assert not lock.exists()


def test_another_build_is_waited_for(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = threading.Timer(0.5, lock.unlink)
    started.start()
    builds.prepare("cpu_adam")
    assert started.finished.is_set() and str(lock) in caplog.text
