"""SLURM's commands, and what they print."""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from s3_megatron.errors import S3Error

# What squeue and scontrol call a job that is, or will be, under way.
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD")

# Variables that sbatch takes in the place of a script's own line, beyond SBATCH_ and the option's name (man sbatch).
_ALSO = {
    "time": ("SBATCH_TIMELIMIT",),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "requeue": ("SBATCH_NO_REQUEUE",),
    "no-requeue": ("SBATCH_REQUEUE",),
}
_NEVER = ("SBATCH_ARRAY_INX", "SBATCH_WAIT")  # several jobs in one folder; an sbatch that waits for the job's end

_SBATCH = re.compile("^#SBATCH.*", re.MULTILINE)

# Which cluster's controller is asked, by whomever.
_SITE = ("SLURM_CONF", "SLURM_CLUSTERS")


@dataclass(frozen=True)
class JobState:
    """A job as the queue reports it; ``reason`` is why it waits."""

    state: str
    reason: str
    nodes: str


def test_script(script: Path) -> None:
    """Ask whether the script would be accepted now; raises S3Error with SLURM's own words where it would not."""
    _sbatch("--test-only", script)


def submit(script: Path) -> str:
    """Queue ``script``; returns the job's number."""
    return _sbatch("--parsable", script).split(";")[0].strip()


def cancel(jobs: list[str]) -> None:
    """End jobs, or take them out of the queue."""
    _run("scancel", *jobs)


def state(job: str) -> JobState | None:
    """How ``job`` is; None where SLURM has forgotten it."""
    try:
        text = _run("scontrol", "--oneliner", "show", "job", job)
    except S3Error:
        return None
    fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return JobState(fields["JobState"], fields.get("Reason", "None"), fields.get("NodeList", "(null)"))


def _sbatch(option: str, script: Path) -> str:
    variables = environment(os.environ, script.read_text(encoding="utf-8"))
    return _run("sbatch", option, str(script), variables=variables)


def _run(*command: str, variables: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, env=variables
        )
    except FileNotFoundError as error:
        raise S3Error(f"{command[0]} is not on the PATH: run this on a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise S3Error(f"{command[0]} does not answer within a minute: is the controller up (scontrol ping)?") from error
    if done.returncode:
        message = " ".join((done.stderr or done.stdout).split())
        raise S3Error(f"{command[0]} refuses: {message}")
    return done.stdout


def environment(variables: Mapping[str, str], script: str) -> dict[str, str]:
    """Give ``variables`` as the job of ``script`` is to be queued with.

    sbatch lets SBATCH_TIMELIMIT and its kin overrule the script's own lines, which a recipe and a cluster decide. And a
    job that is queued from within another (salloc, an srun shell) would take over that one's SLURM_MEM_PER_CPU,
    SLURM_CPU_BIND, SLURM_NTASKS, ..., on which its own srun ends, or binds its ranks.
    """
    options = {option for line in _SBATCH.findall(script) for option in re.findall(r"(?<=\s)--([a-z-]+)", line)}
    dropped = {f"SBATCH_{option.upper().replace('-', '_')}" for option in options}
    dropped |= {name for option in options for name in _ALSO.get(option, ())} | set(_NEVER)
    if "SLURM_JOB_ID" in variables:
        dropped |= {name for name in variables if name.startswith("SLURM_") and name not in _SITE}
    return {name: value for name, value in variables.items() if name not in dropped}
