"""What a job runs on, for people who read its log; without secrets."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

_PREFIXES = ("NCCL_", "SLURM_", "TORCH_", "CUDA_", "S3_", "OMP_")
SECRET = re.compile("KEY|TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
# Values of switches, such as NO_TOKEN=false: no secrets, and they occur in every other variable.
_SWITCHES = {"", "0", "1", "true", "false", "yes", "no", "on", "off"}
_PACKAGES = re.compile("s3-megatron|torch|triton|megatron-core|deepspeed|transformer-engine|apex|nvidia-nccl-.*")


def public(environ: Mapping[str, str]) -> dict[str, str]:
    """Keep what of ``environ`` may be shown and stored, sorted by name.

    That is what NCCL, SLURM, torch, CUDA, OpenMP and this package read, but nothing that is named like a secret, and
    nothing that holds the value of a variable, of any prefix, that is.
    """
    secrets = [value for name, value in environ.items() if SECRET.search(name)]
    secrets = [value for value in secrets if value.strip().lower() not in _SWITCHES]
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(_PREFIXES)
        and not SECRET.search(name)
        and not any(secret in value or secret in name for secret in secrets)
    }


def report() -> Iterator[str]:
    """Describe this node, its software and the job's environment, line by line."""
    yield f"hosts: {os.environ.get('SLURM_JOB_NODELIST') or platform.node()}"
    yield f"kernel: {platform.platform()}, python {platform.python_version()}"
    yield f"gpus: {_gpus()}"
    yield f"packages: {', '.join(_packages())}"
    yield f"s3_megatron's commit: {commit() or 'unknown (not in a git checkout)'}"
    for name, value in public(os.environ).items():
        yield f"{name}={json.dumps(value)}"


def _gpus() -> str:
    lines = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if lines is None:
        return "unknown (nvidia-smi does not run)"
    kinds = lines.splitlines()
    return "; ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))) or "none"


def _packages() -> list[str]:
    found = {
        (package.name.lower().replace("_", "-"), package.version)
        for package in metadata.distributions()
        if package.name  # what an interrupted pip leaves has none
    }
    return [f"{name} {version}" for name, version in sorted(found) if _PACKAGES.fullmatch(name)]


def commit() -> str | None:
    """Give the commit of the checkout that this package lies in, with "-dirty" where it was changed."""
    here = Path(__file__).parent
    described = _output(["git", "-C", os.fspath(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    return described.strip() if described else None


def _output(command: Sequence[str]) -> str | None:
    """Run ``command``; returns what it prints, or None where it is missing, fails or hangs."""
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
