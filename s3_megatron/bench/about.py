"""What a benchmark's figures belong to: the day, the machine and the versions."""

import os
import platform
from datetime import date
from importlib import metadata
from typing import Any

import torch

from s3_megatron import machine

# What makes a better CPU one that has AVX2 alone, in torch's libraries.
LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def about(device: str, *packages: str) -> dict[str, Any]:
    """The day, ``device`` ("cpu" or "cuda") and its name, threads, limits, and the versions of what is installed."""
    versions = {}
    for name in ("s3-megatron", "torch", *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "device": device,
        "processor": machine.processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "python": platform.python_version(),
        "versions": versions,
    }
