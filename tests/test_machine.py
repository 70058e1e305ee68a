"""Cores and memory, where a machine, a container or an operating system leaves less, or says less."""

import os
from pathlib import Path

import pytest

from s3_megatron import machine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups of its own: no test can make real ones."""
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN", tmp_path / "own")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_macos_has_no_affinity_and_no_groups(groups: Path, monkeypatch: pytest.MonkeyPatch):
    """os.sched_getaffinity is not there on macOS, and the demonstration ended with an AttributeError."""
    monkeypatch.delattr(os, "sched_getaffinity")  # this is Linux
    assert machine.cores() == 8
    assert machine.available_memory() > 0


def test_version_2_a_group_limits_those_below_it(groups: Path):
    write(groups, own="0::/outer/inner")
    write(groups / "outer", cpu__max="150000 100000", memory__max="3000", memory__current="2500",
          memory__stat="anon 1\ninactive_file 400")  # fmt: skip
    write(groups / "outer/inner", cpu__max="max 100000", memory__max="max", memory__current="2000", memory__stat="")
    assert machine.cores() == 2, "1.5 cores"
    assert machine.available_memory() == 900


def test_version_1_and_a_container_that_does_not_see_its_own_group(groups: Path):
    write(groups, own="4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/")
    write(groups / "cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    write(groups / "memory", memory__limit_in_bytes="5000", memory__usage_in_bytes="6000",
          memory__stat="total_inactive_file 500")  # fmt: skip
    assert machine.cores() == 1
    assert machine.available_memory() == 0, "never negative"


def test_no_limit(groups: Path):
    write(groups, own="4:memory:/\n1:cpu:/")
    write(groups / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert machine.cores() == 8


def test_the_way_back_to_this_machine():
    assert machine.loopback() in ("lo", "lo0")
