"""What the demonstration refuses before it starts, in one line each, and what it does with what lies about."""

import os
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from s3_megatron import machine
from s3_megatron.demo import __main__ as demo
from s3_megatron.demo import preflight
from s3_megatron.demo.engines import ENGINES, Engine
from s3_megatron.demo.preflight import set_aside

QUIET = Console(quiet=True)


def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path, *args: str) -> str:
    """Run the demonstration in ``folder``; it must end with 2 and one line, which is returned."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["demo", *args])
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)  # they are this test run's
    monkeypatch.setattr(demo, "_demonstrate", lambda *_: pytest.fail("it has started"))
    with pytest.raises(SystemExit) as stop:
        demo.main()
    captured = capfd.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1, captured
    return captured.err


def test_an_engine_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    message = refused(monkeypatch, capfd, tmp_path, "--engine", "fsdp")
    assert "'fsdp'" in message.replace('"', "'") and "'megatron' or 'deepspeed'" in message
    assert not list(tmp_path.iterdir()), "refused before anything is made"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda runs: runs.write_text(""), "is a file"),
        (lambda runs: runs.symlink_to("nowhere"), "is a link that leads nowhere"),
        # /proc: root, who runs tests in containers, can write to every folder but those of the kernel.
        (lambda runs: runs.symlink_to("/proc/self"), "cannot be written"),
    ],
)
def test_a_runs_folder_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, make, message: str
):
    make(tmp_path / "runs")
    assert message in refused(monkeypatch, capfd, tmp_path)


def test_a_second_demonstration_in_the_same_folder(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    """Two of them moved each other's folders away while their ranks wrote into them."""
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs/.demo.lock"):
        assert "runs in" in refused(monkeypatch, capfd, tmp_path)
    with preflight.own_folder(tmp_path / "runs"):
        pass


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path):
    # No machine has too little memory on demand.
    monkeypatch.setattr(machine, "available_memory", lambda: int(3.94 * 2**30))
    assert "3.9 GiB of memory are free, and the demonstration takes 4" in refused(monkeypatch, capfd, tmp_path)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path):
    # Only root can make a small disk.
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**8}))
    assert "0.1 GiB are free on the disk of" in refused(monkeypatch, capfd, tmp_path)


def test_a_missing_package():
    with pytest.raises(Exception, match="no-such-thing is not installed: make demo"):
        preflight.check(Engine(title="", packages=("torch", "no-such-thing"), results=""), QUIET)


def test_one_core_is_slow_and_no_obstacle(monkeypatch: pytest.MonkeyPatch):
    console = Console(record=True, file=open(os.devnull, "w"))
    monkeypatch.setattr(machine, "available_memory", lambda: 2**33)
    for cores, message in ((2, ""), (1, "one core: its two ranks share it, and all takes about twice as long\n")):
        monkeypatch.setattr(machine, "cores", lambda cores=cores: cores)
        preflight.check(ENGINES["megatron"], console)
        assert console.export_text() == message


def test_an_earlier_demonstration_is_set_aside(tmp_path: Path):
    console = Console(quiet=True)
    folder = tmp_path / "demo"
    set_aside(folder, console)
    for text in ("first", "second"):
        folder.mkdir()
        (folder / "report.json").write_text(text)
        set_aside(folder, console)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.previous"]
    assert (tmp_path / "demo.previous/report.json").read_text() == "second"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_whatever_lies_in_the_way_is_set_aside_or_replaced(tmp_path: Path, kind: str):
    folder, previous = tmp_path / "demo", tmp_path / "demo.previous"
    for path in (folder, previous):
        path.write_text("") if kind == "file" else path.symlink_to(tmp_path / "nowhere")
    set_aside(folder, QUIET)
    assert not os.path.lexists(folder) and os.path.lexists(previous)
