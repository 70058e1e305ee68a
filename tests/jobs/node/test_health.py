"""A node's health; nvidia-smi and dmesg are scripts here, for the machines of these tests have no GPU."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s3_megatron.jobs.node import gpus
from s3_megatron.jobs.node.health import check_clock, file_system, main
from tests.launcher import ROOT

# What `nvidia-smi --query-... --format=csv,noheader,nounits` prints.
GPUS = "0, GPU-a, 0, 3\n1, GPU-b, 0, 0\n"
XID = "[{0:.6f}] NVRM: Xid (PCI:0000:3b:00): {1}, pid=77, name=python, Ch 00000008\n"


def script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH, with an nvidia-smi of two good GPUs and a dmesg that says nothing of them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    nvidia_smi(folder)
    script(folder, "dmesg", "echo '[    0.000000] Linux version'")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def nvidia_smi(folder: Path, rows: str = GPUS, apps: str = "") -> None:
    (folder / "gpus").write_text(rows)
    (folder / "apps").write_text(apps)
    body = f'case "$1" in --query-gpu=index,uuid,*) cat {folder}/gpus;; --query-compute-apps=*) cat {folder}/apps;; '
    script(folder, "nvidia-smi", body + "*) exit 9;; esac")


def states(wanted: int = 2) -> dict[str, tuple[str, str]]:
    return {check.name: (check.state, check.found) for check in gpus.check_gpus(wanted, patience=0)}


def test_good_gpus(tools: Path) -> None:
    found = states()
    assert {name: state for name, (state, _) in found.items()} == dict.fromkeys(
        ["gpus", "ecc", "gpu processes", "xid"], "ok"
    )
    assert "ever: 3 0" in found["ecc"][1], "mended by remapping rows: reported, not held against it"


def test_a_gpu_that_fell_off_the_bus(tools: Path) -> None:
    assert states(wanted=3)["gpus"] == ("error", "2 of 3 seen by nvidia-smi")
    script(tools, "nvidia-smi", "echo 'Unable to determine the device handle: Unknown Error'; exit 15")
    state, text = states()["gpus"]
    assert state == "error" and "fails with 15: Unable to determine" in text


def test_an_answer_that_is_not_understood(tools: Path) -> None:
    """A driver's warning on stdout with exit code 0 ended the check in a ValueError, which was taken for a fault of the
    shared storage: no node was excluded."""
    nvidia_smi(tools, "WARNING: infoROM is corrupted at gpu 0000:3B:00.0\n" + GPUS)
    state, text = states()["gpus"]
    assert state == "error" and "answers 'WARNING: infoROM is corrupted" in text and "4 values" in text
    nvidia_smi(tools, apps="GPU-b, 4711\n")
    assert states()["gpu processes"][0] == "not checked"


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("GPU-b", 1),
        ("GPU-b,GPU-a", 2),
        ("GPU-", 0),  # two begin so
        ("1,0", 2),
        ("0,-1,1", 1),  # CUDA stops at what it does not know
        ("", 0),
        ("MIG-GPU-a/1/0", 2),  # a part of a GPU, which no row shows
    ],
)
def test_the_gpus_that_a_job_was_given(tools: Path, visible: str, seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some schedulers give UUIDs; all GPUs of the node were counted then, and others' processes held against it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert states()["gpus"][1] == f"{seen} of 2 seen by nvidia-smi"


def test_the_smallest_gpus_memory(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tools / "sizes").write_text("0, GPU-a, 81559\n1, GPU-b, 24564\n")
    script(tools, "nvidia-smi", f"cat {tools}/sizes")
    assert gpus.least_memory() == 24564 / 1024
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    assert gpus.least_memory() == 81559 / 1024
    (tools / "sizes").write_text("0, GPU-a, [N/A]\n")
    assert gpus.least_memory() is None


def test_memory_errors(tools: Path) -> None:
    nvidia_smi(tools, "0, GPU-a, 0, 0\n1, GPU-b, 2, 7\n")
    assert states()["ecc"] == ("error", "uncorrected memory errors since the driver was loaded: GPU 1: 2")
    nvidia_smi(tools, "0, GPU-a, [N/A], [N/A]\n1, GPU-b, 0, 0\n")
    assert states()["ecc"][0] == "not checked"


def test_another_process_on_a_gpu(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tools, apps="GPU-b, 4711, 60000\n")
    assert states()["gpu processes"] == ("error", "process 4711 holds 60000 MiB of GPU-b")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert states(wanted=1)["gpu processes"] == ("ok", "none"), "GPU 1 is another job's"


def test_the_kernels_log(tools: Path) -> None:
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    script(tools, "dmesg", f"cat {tools}/log")
    for at, number, state in ((uptime - 60, 79, "error"), (uptime - 60, 31, "ok"), (uptime - 7200, 79, "ok")):
        (tools / "log").write_text(XID.format(at, number))
        assert states()["xid"][0] == state, (at, number)
    script(tools, "dmesg", "echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1")
    assert states()["xid"][0] == "not checked"


def test_without_nvidia_smi_nothing_is_reported_as_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {name: state for name, (state, _) in states(wanted=1).items()} == {
        "gpus": "error",
        "ecc": "not checked",
        "gpu processes": "not checked",
        "xid": "not checked",
    }


def test_clocks_are_compared_where_the_file_server_stamps() -> None:
    """The limit was 5 s whatever health.max_clock_skew_seconds was: that reached the all-reduce alone."""
    assert check_clock(100.0, 104.0, "nfs4", limit=5).state == "ok"
    late = check_clock(100.0, 94.0, "nfs", limit=5)
    assert late.state == "error" and late.found == "-6.0 s from the file server's, at most 5 wanted"
    assert check_clock(100.0, 94.0, "nfs", limit=7).state == "ok"
    assert check_clock(100.0, 94.0, "lustre", limit=5).state == "not checked"
    mounts = "21 1 8:1 / / rw - ext4 /dev/a rw\n22 21 0:9 / /my\\040share rw,x shared:1 - nfs4 host:/ rw\n"
    assert file_system(Path("/my share/run"), mounts) == "nfs4"
    assert file_system(Path("/my"), mounts) == "ext4"


def health(run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    given = ["--run-dir", str(run), "--attempt", "5-0", "--gpus", "2", "--scratch", str(run / "not/yet/there"), *flags]
    enough = ["--min-free-gib", "0.001", "--min-free-inodes", "0"]
    command = [sys.executable, "-m", "s3_megatron.jobs.node.health", *enough, *given]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(command, env={**kept, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)


def findings(run: Path) -> dict[str, Any]:
    (path,) = (run / "attempts/5-0").glob("*.health.json")
    assert path.name == f"{socket.gethostname().split('.')[0]}.health.json"
    return {check["name"]: check["state"] for check in json.loads(path.read_text())}


def test_a_rehearsal_on_a_good_node(tmp_path: Path) -> None:
    done = health(tmp_path, "--cpu", "--max-clock-skew", "7.5")
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(tmp_path)
    assert (found["gpus"], found["scratch"], found["run folder"], found["write"]) == ("not checked", "ok", "ok", "ok")
    assert done.stdout.count("health: ") == len(found)
    assert not (tmp_path / "attempts/5-0/bad_nodes").exists()
    assert not list(tmp_path.glob(".health-*"))


def test_a_bad_node_names_itself(tmp_path: Path, tools: Path) -> None:
    nvidia_smi(tools, GPUS.splitlines()[0])
    assert health(tmp_path).returncode == 3
    host = socket.gethostname().split(".")[0]
    assert (tmp_path / "attempts/5-0/bad_nodes").read_text() == f"{host}\tgpus: 1 of 2 seen by nvidia-smi\n"
    assert findings(tmp_path)["gpus"] == "error"


def test_a_full_scratch_is_the_nodes_fault_a_full_run_folder_is_not(tmp_path: Path) -> None:
    """Both are one disk here. Were the shared one the node's fault, every requeue would exclude all nodes."""
    done = health(tmp_path, "--cpu", "--min-free-gib", "1e9")
    assert done.returncode == 3
    assert (findings(tmp_path)["scratch"], findings(tmp_path)["run folder"]) == ("error", "shared")
    assert "run folder" not in (tmp_path / "attempts/5-0/bad_nodes").read_text()


def test_a_full_run_folder_alone_blames_no_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, scratch = os.statvfs, tmp_path / "scratch"
    scratch.mkdir()

    def statvfs(path: Path) -> SimpleNamespace:
        given = real(path)
        free = given.f_bavail if path == scratch else 0  # a full disk of its own cannot be had here
        return SimpleNamespace(f_bavail=free, f_frsize=given.f_frsize, f_files=given.f_files, f_favail=given.f_favail)

    monkeypatch.setattr(os, "statvfs", statvfs)
    flags = ["--run-dir", str(tmp_path), "--attempt", "5-0", "--gpus", "2", "--scratch", str(scratch), "--cpu"]
    monkeypatch.setattr(sys, "argv", ["health", *flags, "--min-free-gib", "0.001", "--min-free-inodes", "0"])
    assert main() == 1
    assert "shared       0.0 GiB free" in capsys.readouterr().out
    assert not (tmp_path / "attempts/5-0/bad_nodes").exists()


def test_a_run_folder_that_cannot_be_written_is_logged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.write_text("not a folder")
    started = time.monotonic()
    done = health(run, "--cpu")
    assert done.returncode == 3
    assert "cannot be written from here" in done.stdout and "cannot leave its findings" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 100
