"""What nvidia-smi and the kernel's log say of a node's GPUs."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from s3_megatron.finding import ERROR, NOT_CHECKED, OK, Finding

_FIELDS = ("index", "uuid", "ecc.errors.uncorrected.volatile.total", "ecc.errors.uncorrected.aggregate.total")
# NVIDIA's "XID Errors" lists them: of the device, its memory or its links. Others, as 13, 31 and 43, programs cause.
_HARDWARE_XIDS = {48, 64, 74, 79, 95, 119, 120}
_RECENT_SECONDS = 3600  # what is older was there when the job before this one ran, or was reset since
_TIMEOUT_SECONDS = 60  # nvidia-smi takes seconds a GPU without persistence mode, and for ever with a broken driver


def check_gpus(wanted: int, patience: float = 20) -> Iterator[Finding]:
    """Count the GPUs, and look for memory errors, errors in the kernel's log, and strangers' processes.

    A process that was killed may hold its GPU for ``patience`` seconds more.
    """
    if shutil.which("nvidia-smi") is None:
        devices = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
        yield _count(len(devices), wanted, "in /dev")
        for name in ("ecc", "gpu processes"):
            yield Finding(NOT_CHECKED, name, "nvidia-smi is not there")
        yield _check_xids()
        return
    rows = _query("--query-gpu", _FIELDS)
    if isinstance(rows, str):
        yield Finding(ERROR, "gpus", rows)
        return
    rows = _ours(rows)
    yield _count(len(rows), wanted, "by nvidia-smi")
    yield _check_ecc(rows)
    yield _check_processes({row["uuid"] for row in rows}, patience)
    yield _check_xids()


def _query(what: str, fields: Sequence[str]) -> list[dict[str, str]] | str:
    """Ask nvidia-smi; returns a dict a row, or what went wrong."""
    command = ["nvidia-smi", f"{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"nvidia-smi does not answer in {_TIMEOUT_SECONDS} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0:
        return f"nvidia-smi fails with {done.returncode}: {' '.join((done.stdout + done.stderr).split())}"
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    # A warning of the driver, or of a wrapper, comes on stdout, too, and with exit code 0.
    if odd := [line for line, cells in zip(lines, rows, strict=True) if len(cells) != len(fields)]:
        return f"nvidia-smi answers {odd[0]!r} where {len(fields)} values were asked for"
    return [dict(zip(fields, cells, strict=True)) for cells in rows]


def _ours(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Leave out GPUs of other jobs on this node, which nvidia-smi shows where SLURM does not confine devices.

    CUDA_VISIBLE_DEVICES has indices or UUIDs, or the beginnings of UUIDs, and CUDA stops at one that it does not know.
    Parts of a GPU (MIG) have UUIDs of their own, of which nvidia-smi's rows know nothing.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or "MIG-" in visible:
        return rows
    mine: list[dict[str, str]] = []
    for device in (part.strip() for part in visible.split(",")):
        one = [row for row in rows if device and (row["index"] == device or row["uuid"].startswith(device))]
        if len(one) != 1:
            break
        mine += one
    return mine


def least_memory() -> float | None:
    """The GiB of the smallest GPU here that this process may use, as nvidia-smi has it; None where it does not say."""
    if shutil.which("nvidia-smi") is None:
        return None
    rows = _query("--query-gpu", ("index", "uuid", "memory.total"))
    sizes = [] if isinstance(rows, str) else [row["memory.total"] for row in _ours(rows)]
    return min(map(int, sizes)) / 1024 if sizes and all(size.isdecimal() for size in sizes) else None


def _count(seen: int, wanted: int, where: str) -> Finding:
    text = f"{seen} of {wanted} seen {where}"
    return Finding(OK if seen >= wanted else ERROR, "gpus", text)


def _check_ecc(rows: list[dict[str, str]]) -> Finding:
    """Errors since the driver was loaded are bad; older ones were mended by remapping rows, or are not readable."""
    volatile, aggregate = _FIELDS[2], _FIELDS[3]
    known = [row for row in rows if row[volatile].isdecimal()]
    if len(known) < len(rows) or not rows:
        return Finding(NOT_CHECKED, "ecc", "nvidia-smi does not give the count for every GPU")
    broken = [f"GPU {row['index']}: {row[volatile]}" for row in known if int(row[volatile]) > 0]
    if broken:
        return Finding(ERROR, "ecc", f"uncorrected memory errors since the driver was loaded: {', '.join(broken)}")
    return Finding(OK, "ecc", f"none uncorrected; ever: {' '.join(row[aggregate] for row in known)}")


def _check_processes(ours: set[str], patience: float) -> Finding:
    fields = ("gpu_uuid", "pid", "used_memory")
    end = time.monotonic() + patience
    while True:
        rows = _query("--query-compute-apps", fields)
        if isinstance(rows, str):
            return Finding(NOT_CHECKED, "gpu processes", rows)
        rows = [row for row in rows if row["gpu_uuid"] in ours]
        if not rows:
            return Finding(OK, "gpu processes", "none")
        if time.monotonic() >= end:
            break
        time.sleep(2)
    held = ", ".join(f"process {row['pid']} holds {row['used_memory']} MiB of {row['gpu_uuid']}" for row in rows)
    return Finding(ERROR, "gpu processes", held)


def _check_xids() -> Finding:
    try:
        done = subprocess.run(
            ["dmesg"], capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return Finding(NOT_CHECKED, "xid", "dmesg does not run")
    if done.returncode != 0:
        return Finding(NOT_CHECKED, "xid", "the kernel's log is not readable here")
    since = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - _RECENT_SECONDS
    found = re.finditer(r"^\[ *(\d+\.\d+)\] .*NVRM: Xid \(([^)]*)\): (\d+)", done.stdout, re.MULTILINE)
    recent = [(match[2], int(match[3])) for match in found if float(match[1]) > since]
    broken = [f"Xid {number} of {device}" for device, number in recent if number in _HARDWARE_XIDS]
    if broken:
        return Finding(ERROR, "xid", f"in the last hour: {', '.join(dict.fromkeys(broken))}")
    return Finding(OK, "xid", f"none of the hardware in the last hour ({len(recent)} of programs)")
