"""What SLURM's commands are handed. What they answer is in tests/slurm."""

from pathlib import Path

import pytest

from s3_megatron.jobs import compose, slurm
from s3_megatron.jobs.render import render

OUTSIDE = {"PATH": "/usr/bin", "SLURM_CONF": "/etc/slurm.conf", "WANDB_API_KEY": "x", "SBATCH_EXPORT": "NONE"}
INSIDE = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "9", "SLURM_CPU_BIND": "quiet"}


def script(*settings: str) -> str:
    return render(compose.load("gpt2_tiny", "slurm", settings), Path("/shared/runs/first"))


def test_a_job_that_is_queued_from_within_another_does_not_take_over_its_variables() -> None:
    """With salloc's SLURM_MEM_PER_CPU beside the job's own --mem its srun ends: they exclude one another."""
    assert slurm.environment({**OUTSIDE, **INSIDE}, script()) == OUTSIDE
    named = {**OUTSIDE, "SLURM_TIME_FORMAT": "relative"}
    assert slurm.environment(named, script()) == named, "a person's own settings of SLURM's commands"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "SBATCH_TIMELIMIT",
            "SBATCH_PARTITION",
            "SBATCH_JOB_NAME",
            "SBATCH_OUTPUT",
            "SBATCH_OPEN_MODE",
            "SBATCH_SIGNAL",
        ),
        *("SBATCH_NO_REQUEUE", "SBATCH_MEM_PER_CPU", "SBATCH_EXCLUSIVE", "SBATCH_GPUS_PER_NODE", "SBATCH_ARRAY_INX"),
        *("SBATCH_WAIT", "SBATCH_QOS"),
    ],
)
def test_no_variable_overrules_a_line_of_the_script(name: str) -> None:
    """sbatch prefers SBATCH_TIMELIMIT to #SBATCH --time, and the job was killed before it saved."""
    text = script("cluster.slurm.options=[--qos=high]")
    assert slurm.environment({**OUTSIDE, name: "1"}, text) == OUTSIDE


def test_what_the_script_leaves_out_a_site_may_say() -> None:
    site = {**OUTSIDE, "SBATCH_ACCOUNT": "abc", "SBATCH_QOS": "high"}
    assert slurm.environment(site, script()) == site
    assert "SBATCH_ACCOUNT" not in slurm.environment(site, script("cluster.slurm.account=own"))


def test_sbatch_is_handed_that_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sbatch prints what it is handed: a controller would not show it."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv >{tmp_path}/seen\necho 12\n")
    sbatch.chmod(0o755)
    job = tmp_path / "job.sbatch"
    job.write_text(script())
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {**INSIDE, "SBATCH_TIMELIMIT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert slurm.submit(job) == "12"
    assert "SLURM_" not in (seen := (tmp_path / "seen").read_text()) and "SBATCH_" not in seen
    assert "PATH=" in seen
