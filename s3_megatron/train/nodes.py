"""What programs on the nodes of a job tell the batch script. Its import brings no torch."""

import os
import socket
from pathlib import Path

BAD_NODES_EXIT_CODE = 3


def node_name() -> str:
    """Name this node as SLURM does, which is the name that can be excluded; the host's short name elsewhere."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def report_bad_node(attempt: Path, name: str, reason: str) -> None:
    """Append a line to ``attempt/bad_nodes``, in one write: several nodes append to it at the same time."""
    attempt.mkdir(parents=True, exist_ok=True)
    line = f"{name}\t{' '.join(reason.split())}\n"
    descriptor = os.open(attempt / "bad_nodes", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
