"""What GPU is here, and why it cannot be used, if it cannot: ``python -m benchmarks.gpu.card`` prints it as JSON.

A program of its own: a broken driver hangs the process that asks it.
"""

import json
import shutil
import subprocess
from typing import Any

from benchmarks.gpu.runner import write_numbers
from s3_megatron.errors import first_line

LEAST_CAPABILITY = (8, 0)


def look() -> dict[str, Any]:
    """Ask torch and the driver; ``obstacle`` is None or one line for people."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "obstacle": None}
    if not torch.cuda.is_available():
        return found | {"obstacle": _no_gpu(torch)}
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    try:
        free, total = torch.cuda.mem_get_info()
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:  # of another architecture than torch is built for, or in use by another alone
        obstacle = f"{properties.name} does not run torch: {first_line(error)}"
        return found | {"name": properties.name, "obstacle": obstacle}
    found |= {
        "name": properties.name,
        "capability": f"{capability[0]}.{capability[1]}",
        "multiprocessors": properties.multi_processor_count,
        "total_gib": total / 2**30,
        "free_gib": free / 2**30,
        "driver": _driver(),
    }
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        reason = f"{properties.name} has compute capability {found['capability']}, and Triton supports 8.0 and later"
        return found | {"obstacle": reason}
    return found


def _no_gpu(torch: Any) -> str:
    if shutil.which("nvidia-smi") is None:
        return "no GPU: torch sees none, and nvidia-smi is not here"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"nvidia-smi is here, and torch {torch.__version__} has no GPU: {first_line(error)}"
    return f"nvidia-smi is here, and torch {torch.__version__} sees no GPU: look at CUDA_VISIBLE_DEVICES"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


if __name__ == "__main__":
    found = look()
    print(json.dumps(found))
    write_numbers(found)
