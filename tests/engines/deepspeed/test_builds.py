"""Locks of torch's builds of extensions, those of killed ones among them."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from s3_megatron.bench.builds import prepare
from s3_megatron.engines.deepspeed import register, unregister
from s3_megatron.errors import S3Error


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
    prepare("cpu_adam")
    assert not lock.exists()


def test_a_killed_builds_lock_of_someone_else_is_named(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a group shares TORCH_EXTENSIONS_DIR, the first rank that found an old lock was a traceback."""

    def refused(path: Path) -> None:  # root, which tests may run as, may remove all
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    old = time.time() - 21 * 60
    os.utime(lock, (old, old))
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(S3Error, match=f"{lock}, of a build that was killed, .*set TORCH_EXTENSIONS_DIR to a folder"):
        prepare("cpu_adam")


def test_another_build_is_waited_for(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = threading.Timer(0.5, lock.unlink)
    started.start()
    prepare("cpu_adam")
    assert started.finished.is_set() and str(lock) in caplog.text


def test_an_extension_that_a_training_run_needs_waits_in_the_same_way(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """DeepSpeedCPUAdam under offload, or collectives on CPUs: after a killed build every rank waited, in silence."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    class StopBuild(Exception):
        pass

    def compatible(*_: object) -> bool:  # the first that jit_load asks
        raise StopBuild

    old = time.time() - 21 * 60
    os.utime(lock, (old, old))
    monkeypatch.setattr(CPUAdamBuilder, "is_compatible", compatible)
    register()
    try:
        with pytest.raises(StopBuild):
            CPUAdamBuilder().jit_load()
    finally:
        unregister()
    assert not lock.exists() and "one was killed: remove that file" in caplog.text
