"""What SLURM's commands are handed, and what is made of answers that the real ones of tests/slurm seldom give."""

import os
import shutil
from pathlib import Path

import pytest

from s3_megatron.errors import S3Error
from s3_megatron.jobs import compose, runs, slurm, status, submit
from s3_megatron.jobs.render import render
from s3_megatron.jobs.runs import Run

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


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Put shell scripts in the place of SLURM's commands."""
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def queued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run for SLURM whose job is 7."""
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    job = compose.load("gpt2_tiny", "slurm", [f"cluster.runs_dir={folder}/runs"])
    path = submit.folder(job, "first")
    run = runs.create(job, path, render(job, path))
    run.submitted("7")
    return run


def shown(run: Run, state: str = "RUNNING") -> str:
    """A scontrol that shows job 7 as SLURM 22.05 does."""
    return f"""printf '%s\\n' 'JobId=7 JobName=first' '   JobState={state} Reason=None' '   NodeList=node1' \\
        '   Command={run.path}/job.sbatch' '   WorkDir=/'"""


def test_sbatch_is_handed_that_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sbatch prints what it is handed: a controller would not show it."""
    stand_in(tmp_path, monkeypatch, sbatch=f"env >{tmp_path}/seen\necho 12")
    job = tmp_path / "job.sbatch"
    job.write_text(script())
    for name, value in {**INSIDE, "SBATCH_TIMELIMIT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert slurm.submit(job) == "12"
    assert "SLURM_" not in (seen := (tmp_path / "seen").read_text()) and "SBATCH_" not in seen
    assert "PATH=" in seen


@pytest.mark.parametrize(
    "answer", ["12", "12;alpha", "Welcome to 3 partitions\n\n12", "Submitted batch job 12", "12\nbye"]
)
def test_the_number_is_found_in_what_a_sites_sbatch_prints(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's wrapper greets on standard output, and the greeting became a part of the job's number."""
    stand_in(tmp_path, monkeypatch, sbatch=f"printf '{answer}\\n'")
    (job := tmp_path / "job.sbatch").write_text(script())
    assert slurm.submit(job) == "12"


def test_an_sbatch_without_a_number_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, sbatch="echo queued as abc")
    (job := tmp_path / "job.sbatch").write_text(script())
    with pytest.raises(S3Error, match="names no job, but says 'queued as abc'"):
        slurm.submit(job)


def test_a_controller_that_is_away_has_not_forgotten_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``status`` said of a job that ran that SLURM had forgotten it, and to resume it; ``cancel`` found no job."""
    run = queued(tmp_path, monkeypatch)
    away = "Unable to contact slurm controller (connect failure)"
    stand_in(tmp_path, monkeypatch, scontrol=f"echo 'slurm_load_jobs error: {away}' >&2; exit 1")
    assert status.status(run).state.startswith("unknown: scontrol refuses: ") and away in status.status(run).state
    for command in (lambda: submit.cancel(run), lambda: submit.resume(run, print)):
        with pytest.raises(S3Error, match="Unable to contact"):
            command()
    assert run.ended is None
    stand_in(tmp_path, monkeypatch, scontrol="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert status.status(run).state == (
        "stopped, unless on another cluster (SLURM here knows none of its jobs): s3-megatron resume first"
    )
    monkeypatch.setenv("PATH", "")
    assert "scontrol is not on the PATH" in status.status(run).state


@pytest.mark.parametrize(
    "state", ["SIGNALING", "RESIZING", "STAGE_OUT", "SPECIAL_EXIT", "RESV_DEL_HOLD", "REQUEUE_FED", "COMPLETING"]
)
def test_what_is_not_over_is_in_the_queue(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was just sent a signal, or is held, was called stopped, and ``resume`` queued a second one."""
    run = queued(tmp_path, monkeypatch)
    stand_in(tmp_path, monkeypatch, scontrol=shown(run, state))
    assert status.status(run).state == f"{state.lower()} as job 7 on node1"
    with pytest.raises(S3Error, match="still in the queue as job 7"):
        submit.resume(run, print)
    stand_in(tmp_path, monkeypatch, scontrol=shown(run, "PREEMPTED"))
    assert status.status(run).state == "stopped, job 7 is PREEMPTED: s3-megatron resume first"


def test_another_job_of_the_same_number_is_let_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``cancel`` of a copied run folder ended the original's job; on a second cluster, any job with that number."""
    run = queued(tmp_path, monkeypatch)
    stand_in(tmp_path, monkeypatch, scontrol=shown(run), scancel=f"echo $* >{tmp_path}/cancelled")
    copy = Run(Path(shutil.copytree(run.path, tmp_path / "runs/copy")))
    with pytest.raises(S3Error, match="copy has no job in the queue"):
        submit.cancel(copy)
    assert "stopped, unless on another cluster" in status.status(copy).state
    assert not (tmp_path / "cancelled").exists()
    (tmp_path / "mounted").symlink_to(tmp_path / "runs")
    assert status.status(Run(tmp_path / "mounted/first")).state == "running as job 7 on node1"
    moved = Run(run.path.rename(tmp_path / "runs/moved"))
    assert submit.cancel(moved) == ["7"], "its job goes on under the old name"
    assert (tmp_path / "cancelled").read_text() == "7\n"


def test_a_job_that_cannot_be_noted_is_not_left_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the job stayed queued, no command knew it, and ``submit`` removed the folder under it."""
    run = queued(tmp_path, monkeypatch)
    run.jobs.unlink()
    run.jobs.mkdir()  # an OSError, as of a full disk
    stand_in(tmp_path, monkeypatch, sbatch="echo 8", scancel=f"echo $* >{tmp_path}/cancelled")
    with pytest.raises(S3Error, match=r"job 8 was taken out of the queue again, for .*jobs\.jsonl cannot be written"):
        submit.queue(run)
    assert (tmp_path / "cancelled").read_text() == "8\n"
