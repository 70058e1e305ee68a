"""SLURM's commands, and what they print."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from s3_megatron.errors import S3Error

# What scontrol calls a job that is over (man squeue); in any other state it is, or will be, under way.
_OVER = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT")

# Variables that sbatch takes in the place of a script's own line, beyond SBATCH_ and the option's name (man sbatch).
_ALSO = {
    "time": ("SBATCH_TIMELIMIT",),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "requeue": ("SBATCH_NO_REQUEUE",),
    "no-requeue": ("SBATCH_REQUEUE",),
}
_NEVER = ("SBATCH_ARRAY_INX", "SBATCH_WAIT")  # several jobs in one folder; an sbatch that waits for the job's end

_SBATCH = re.compile("^#SBATCH.*", re.MULTILINE)
# What sbatch answers with --parsable, and where a site's wrapper does not pass that on.
_NUMBER = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;.*| on cluster .*)?$", re.MULTILINE)
_SCRIPT = re.compile(r"^ *Command=(.*)$", re.MULTILINE)

# Which cluster's controller is asked, by whomever.
_SITE = ("SLURM_CONF", "SLURM_CLUSTERS")


@dataclass(frozen=True)
class JobState:
    """A job as the queue reports it; ``reason`` is why it waits."""

    state: str
    reason: str
    nodes: str

    @property
    def alive(self) -> bool:
        """Whether the job is, or will be, under way."""
        return not _OVER.fullmatch(self.state)


def test_script(script: Path) -> None:
    """Ask whether the script would be accepted now; raises S3Error with SLURM's own words where it would not."""
    _sbatch("--test-only", script)


def submit(script: Path) -> str:
    """Queue ``script``; returns the job's number: what a site's wrapper prints of its own comes before it."""
    text = _sbatch("--parsable", script)
    if not (numbers := _NUMBER.findall(text)):
        raise S3Error(
            f"sbatch names no job, but says {' '.join(text.split())!r}: see whether it is queued (squeue --me)"
        )
    return numbers[-1]


def cancel(jobs: list[str]) -> None:
    """End jobs, or take them out of the queue."""
    _run("scancel", *jobs)


def states(jobs: Sequence[str], script: Path) -> dict[str, JobState]:
    """How those of ``jobs`` are, by number, that SLURM has not forgotten and that were queued by ``script``.

    A number may be another job's, too: on another cluster with the same runs_dir, or in a copied run folder the
    original's. A job whose script is not there any more counts: its run was moved.

    Raises:
        S3Error: SLURM does not answer.
    """
    found = {}
    for job in jobs:
        try:
            text = _run("scontrol", "show", "job", job)
        except S3Error as error:
            if "Invalid job id" in str(error):
                continue
            raise
        queued = _SCRIPT.search(text)
        if queued is None or _same_or_gone(Path(queued[1]), script):
            fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
            found[job] = JobState(fields["JobState"], fields.get("Reason", "None"), fields.get("NodeList", "(null)"))
    return found


def _same_or_gone(queued: Path, script: Path) -> bool:
    try:
        return queued.samefile(script)  # whatever it is called: login nodes mount a folder in several places
    except OSError:
        return True


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
