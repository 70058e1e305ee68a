"""SLURM's commands, and what they print."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from s3_megatron.errors import S3Error

# What squeue and scontrol call a job that is, or will be, under way.
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True)
class JobState:
    """A job as the queue reports it; ``reason`` is why it waits."""

    state: str
    reason: str
    nodes: str


def test_script(script: Path) -> None:
    """Ask whether the script would be accepted now; raises S3Error with SLURM's own words where it would not."""
    _run("sbatch", "--test-only", str(script))


def submit(script: Path) -> str:
    """Queue ``script``; returns the job's number."""
    return _run("sbatch", "--parsable", str(script)).split(";")[0].strip()


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


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    except FileNotFoundError as error:
        raise S3Error(f"{command[0]} is not on the PATH: run this on a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise S3Error(f"{command[0]} does not answer within a minute: is the controller up (scontrol ping)?") from error
    if done.returncode:
        message = " ".join((done.stderr or done.stdout).split())
        raise S3Error(f"{command[0]} refuses: {message}")
    return done.stdout
