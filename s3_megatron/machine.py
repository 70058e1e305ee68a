"""What this machine lets a process use, on Linux and macOS, inside a container and outside."""

import io
import math
import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

# Linux' control groups; macOS has neither folder nor file.
_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def use_utf8() -> None:
    """Let this program work in any locale; in Latin-1 or ASCII it starts again, in Python's UTF-8 mode.

    Paths go into files that are UTF-8, and torch reads its own files by the locale (2.13,
    _inductor.utils.load_template): neither works otherwise. Whatever this program starts inherits the mode.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        # A letter that the terminal does not have is no reason to end.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_first_rank() -> bool:
    """Whether this is the rank that logs for all, or a process alone."""
    return os.environ.get("RANK", "0") == "0"


def cores() -> int:
    """Count the cores that this process may use: by its affinity, which macOS does not have, and its groups' quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas())]))


def available_memory() -> int:
    """Give the bytes that can be had without swapping, of the machine's and of what its groups leave this process."""
    import psutil  # of the extra `jobs`: who only counts cores need not have it

    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def processor() -> str:
    """Name the processor and count its cores, as far as the system says."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def node_name() -> str:
    """Name this node as SLURM does, which is the name that can be excluded; the host's short name elsewhere."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def loopback() -> str | None:
    """Name the network interface that leads back to this machine: lo on Linux, lo0 on macOS."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _quotas() -> Iterator[float]:
    """Yield the cores that each group allows: cpu.max in version 2, cpu.cfs_quota_us in version 1."""
    for group in _groups("cpu"):
        period, quota = _number(group / "cpu.cfs_period_us"), _number(group / "cpu.cfs_quota_us")
        if quota is None and (group / "cpu.max").exists():
            first, second = (group / "cpu.max").read_text(encoding="utf-8").split()
            quota, period = (None if first == "max" else int(first)), int(second)
        if quota is not None and quota > 0 and period:
            yield quota / period


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes that each group has left; what it holds of files' contents is given up when needed."""
    for group in _groups("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _number(group / limit), _number(group / used)
            if most is not None and now is not None:
                counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
                yield max(0, most - now + int(counts.get(cache, 0)))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the groups that this process is in, the innermost first, in both versions.

    In a container /proc may name a group that cannot be seen there; the groups above it then count.
    """
    for line in _OWN.read_text(encoding="utf-8").splitlines() if _OWN.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = _GROUPS / controller if controllers else _GROUPS
        inner = top / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def _number(file: Path) -> int | None:
    """Read a file that holds a number; None where it is missing or says "max"."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
