"""The cluster is what the other tests here take it for, and SLURM 22.05 does what the job's batch script relies on.

Leaving nodes out and pre-emption are in test_jobs.py, with the script itself.

What was found out with it, and is not written in SLURM's manual pages:

- ``scontrol requeue`` from within the batch script makes the job COMPLETING and sends TERM; KILL follows after
  KillWait. If the script leaves at once the job starts again after cred_expire + 1 s; if it lingers, KillWait later.
- ExcNodeList cannot be set on a running job ("Job is no longer pending execution"), but on a requeued one, even while
  it is COMPLETING. ``requeuehold``, ``update``, ``release`` leave no moment at which it could start without it. The
  list survives later requeues, and an update replaces it. With too few nodes left, or with a node that --nodelist
  names, the job waits for ever (BadConstraints): ``sbatch --test-only --exclude`` finds out beforehand. A job's owner
  may do all this.
- In the batch script ``squeue -h -j $SLURM_JOB_ID -o %T`` says RUNNING in normal running and in the grace time of a
  pre-emption, and COMPLETING after scancel, the time limit, a node failure and the end of the grace time. Only RUNNING
  allows ``scontrol requeue``: after scancel and the time limit it would bring the job back.
- srun returns the highest code of its tasks, where a task that a signal ended counts as 128 + signal: 143 for the
  innocent ones that --kill-on-bad-exit ended with TERM, 137 for those that took longer than KillWait. So 3 and 75
  arrive only if every other task leaves on TERM with a lower code of its own. After a node failure srun may return 0:
  only a file that training wrote says that it is finished.
- After a node died the job is COMPLETING within SlurmdTimeout + 11 s (19 s here, most often), whatever the other tasks
  did: srun waits for the lost one.
"""

import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster


def batch(folder: Path, body: str, *options: str) -> Path:
    """A batch script that ignores TERM, ends at once in its second start, and writes to ``folder``/job.log."""
    head = [f"#SBATCH {option}" for option in ("--ntasks-per-node=1", "--requeue", "--open-mode=append", *options)]
    first = 'echo "start ${SLURM_RESTART_COUNT:-0} on" $(scontrol show hostnames "$SLURM_JOB_NODELIST")'
    once = '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0'
    state = 'state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T; }'
    lines = ["#!/bin/bash", *head, f"#SBATCH --output={folder}/job.log", "trap '' TERM", state, first, once, body, ""]
    folder.mkdir(exist_ok=True)
    script = folder / "job.sbatch"
    script.write_text("\n".join(lines))
    return script


def log(folder: Path) -> str:
    """The job's log so far."""
    file = folder / "job.log"
    return file.read_text() if file.exists() else ""


def says(cluster: Cluster, folder: Path, text: str, seconds: float) -> None:
    """Wait until the job's log has the text."""
    cluster.wait_for(lambda: text in log(folder), seconds, f"{text!r} in the log", folder)


def test_nodes_are_machines_of_their_own(cluster: Cluster) -> None:
    """Host names, addresses and processes of their own; one file system, as with shared storage."""
    seen = cluster.run("srun", "-N4", "sh", "-c", "hostname; hostname --all-ip-addresses").stdout.split()
    assert len(set(seen)) == 8 and {"node1", "node2", "node3", "node4"} < set(seen)
    assert "slurmd" in cluster.exec("node2", "ps", "-e").stdout
    assert "munged" not in cluster.exec("node2", "ps", "-e").stdout


def test_gpus_are_granted_and_refused(cluster: Cluster) -> None:
    show = 'echo "$SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES"'
    granted = cluster.run("srun", "-N2", "--gpus-per-node=h100:2", "sh", "-c", show)
    assert granted.stdout.splitlines() == ["2 0,1"] * 2
    for wish in ("--gpus-per-node=9", "--gres=gpu:a100:1"):
        refused = cluster.run("srun", "-N1", wish, "true", check=False)
        assert refused.returncode != 0 and "Requested node configuration is not available" in refused.stderr


def test_script_that_ignores_term_requeues_itself(cluster: Cluster, tmp_path: Path) -> None:
    """TERM cannot end it, and what it does after ``scontrol requeue`` goes on until KillWait has passed."""
    script = batch(tmp_path, 'state; scontrol requeue "$SLURM_JOB_ID"; state; sleep 3; echo alive; sleep 60')
    job = cluster.submit(script)
    assert cluster.wait_over(job, 60, tmp_path) == "COMPLETED"
    assert cluster.restarts(job) == 1
    printed = [line for line in log(tmp_path).splitlines() if not line.startswith("slurmstepd")]
    assert [line for line in printed if not line.startswith("start")] == ["RUNNING", "COMPLETING", "alive"]


def test_scancel_is_recognized_by_the_state_and_undone_by_requeue(cluster: Cluster, tmp_path: Path) -> None:
    """Whoever requeues without asking for the state brings a cancelled job back."""
    wait = "echo up; while [ $(state) = RUNNING ]; do sleep 0.2; done; state"
    asked, blind = tmp_path / "asked", tmp_path / "blind"
    jobs = {asked: cluster.submit(batch(asked, wait))}
    jobs[blind] = cluster.submit(batch(blind, f'{wait}; scontrol requeue "$SLURM_JOB_ID"'))
    for folder, job in jobs.items():
        says(cluster, folder, "up", 20)
        cluster.cancel(job)
    assert cluster.wait_over(jobs[asked], 30, tmp_path) == "CANCELLED"
    assert "COMPLETING" in log(asked)
    cluster.wait_for(lambda: cluster.restarts(jobs[blind]) == 1, 30, "the cancelled job back", tmp_path)
    assert cluster.wait_over(jobs[blind], 30, tmp_path) == "COMPLETED"


# A line is one write: print() makes several of it, and four processes share the log.
TASK = """
import os, signal, sys, time
name = sys.argv[1]
def say(what):
    os.write(1, f"{what} {name}\\n".encode())
signal.signal(signal.SIGTERM, lambda *_: say("TERM reached"))
if name == "task":
    for child in ("child", "child with a session of its own"):
        if os.fork() == 0:
            if child != "child":
                os.setsid()
            os.execv(sys.executable, [sys.executable, __file__, child])
say("up:")
while True:
    time.sleep(1)
"""


def test_signal_before_the_limit_reaches_the_steps_alone(cluster: Cluster, tmp_path: Path) -> None:
    """TERM, some time before the limit, to the step's tasks and their children, in other sessions too; not to the
    batch shell and what it started itself. SLURM looks every 30 s. After the limit the state is COMPLETING.

    CI once found "TERM reachedTERM reached child": the processes printed at one time, a piece a write.
    """
    task = tmp_path / "task.py"
    task.write_text(TASK)
    start = f'python3 "{task}" "child of the shell" & srun python3 "{task}" task &'
    body = f"{start} while [ $(state) = RUNNING ]; do sleep 0.3; done; state"
    job = cluster.submit(batch(tmp_path, body, "--time=1", "--signal=TERM@45"))
    names = {"task", "child", "child with a session of its own"}
    says(cluster, tmp_path, "up: child of the shell", 20)
    reached = "TERM reached "
    cluster.wait_for(lambda: log(tmp_path).count(reached) >= 3, 60, "TERM", tmp_path)
    time.sleep(1)
    assert cluster.state(job) == "RUNNING"
    assert {line.removeprefix(reached) for line in log(tmp_path).splitlines() if line.startswith(reached)} == names
    assert cluster.wait_over(job, 120, tmp_path) == "TIMEOUT"
    assert "\nCOMPLETING\n" in log(tmp_path)


@pytest.mark.parametrize(
    ("task", "code"),
    [
        ('[ "$SLURM_PROCID" != 1 ] || exit 3; sleep 30', 143),
        ('trap "exit 0" TERM; [ "$SLURM_PROCID" != 1 ] || exit 3; while :; do sleep 0.2; done', 3),
        ('trap "exit 3" TERM; [ "$SLURM_PROCID" != 1 ] || exit 75; while :; do sleep 0.2; done', 75),
        ('trap "exit 75" TERM; [ "$SLURM_PROCID" != 1 ] || exit 3; while :; do sleep 0.2; done', 75),
        ('trap "exit 0" TERM; [ "$SLURM_PROCID" != 1 ] || kill -KILL $$; while :; do sleep 0.2; done', 137),
    ],
)
def test_exit_code_of_srun_is_the_highest(cluster: Cluster, task: str, code: int) -> None:
    """One task's code ends the others with TERM, and what they make of it counts as much."""
    # A moment, so that the other task has set its trap when this one leaves.
    task = task.replace("!= 1 ] ||", "!= 1 ] || sleep 1; [ $SLURM_PROCID != 1 ] ||")
    done = cluster.run("srun", "-N2", "--kill-on-bad-exit=1", "--wait=60", "bash", "-c", task, check=False, timeout=20)
    assert done.returncode == code, done.stderr


def test_job_whose_batch_script_died_with_its_node_starts_again_on_the_others(cluster: Cluster, tmp_path: Path) -> None:
    """test_jobs.py has the death of another node."""
    body = "srun sh -c 'echo up; sleep 300'; while [ $(state) = RUNNING ]; do sleep 0.2; done"
    job = cluster.submit(batch(tmp_path, body, "--nodes=2"))
    says(cluster, tmp_path, "up", 20)
    dead = cluster.nodes_of(job)[0]
    cluster.poweroff(dead)
    assert cluster.wait_over(job, 90, tmp_path) == "COMPLETED"
    assert cluster.restarts(job) == 1 and dead not in cluster.nodes_of(job)
    cluster.revive()
    assert cluster.exec(dead, "hostname").stdout.strip() == dead


ODD = [
    "a b",
    "a'b",
    'a"b',
    "$(touch x)",
    "`id` $HOME",
    "a\\b",
    "b\\",
    "%j",
    "%",
    "\\%j",
    "#a",
    "a #b",
    "a\tb",
    "*[c]?;&|",
    "é",
]


def directive(option: str, value: str, is_path: bool = False) -> str:
    """An #SBATCH line that sbatch takes literally: any character but a newline (and NUL) can be written.

    sbatch knows "..." with backslashes, and no shell. In a file's name "%" is written "%%", unless it has a backslash:
    any backslash there says that "%" is itself, and is written twice.
    """
    if is_path:
        value = value.replace("\\", "\\\\") if "\\" in value else value.replace("%", "%%")
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{quoted}"'


def test_names_with_odd_characters_are_taken_literally(cluster: Cluster, tmp_path: Path) -> None:
    jobs = {}
    for text in ODD:
        script = tmp_path / "job.sbatch"
        lines = [
            "#!/bin/bash",
            directive("job-name", text),
            directive("output", f"{tmp_path}/out {text}", True),
            "true",
        ]
        script.write_text("\n".join(lines) + "\n")
        jobs[text] = cluster.submit(script)
    for text, job in jobs.items():
        assert cluster.wait_over(job, 60) == "COMPLETED"
        assert cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%j").stdout == text + "\n"
    assert {file.name for file in tmp_path.glob("out *")} == {f"out {text}" for text in ODD}
