"""What a process does with a signal, by Linux's /proc."""

import signal
from pathlib import Path


def is_in(pid: int, mask: str, number: signal.Signals) -> bool:
    """Whether ``number`` is in the process's ``mask``: SigIgn (ignored), SigCgt (caught), SigBlk (blocked)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split(f"{mask}:")[1].split()[0], 16) & 1 << (number - 1))
