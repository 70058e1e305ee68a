"""From a job to a run under way: in SLURM's queue, or in this terminal."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

from s3_megatron.errors import S3Error
from s3_megatron.jobs import edits, runs, slurm
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.render import render
from s3_megatron.jobs.runs import Run
from s3_megatron.jobs.schema import valid_name
from s3_megatron.run_folder import BATCH_SCRIPT, FINISHED


def folder(job: Job, name: str | None) -> Path:
    """Where the run called ``name`` belongs; without one it is called by recipe, optimizer and time.

    Raises:
        S3Error: ``name`` has a character that a job's name cannot have.
    """
    if name is not None and not valid_name(name):
        raise S3Error(f"--name {name!r} must be letters, digits, '.', '_' and '-', such as {job.recipe.name}-2")
    default = f"{job.recipe.name}-{job.recipe.optimizer.name}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path(job.cluster.runs_dir).resolve() / (name or default)


def submit(job: Job, path: Path) -> Run:
    """Make the run folder ``path`` and queue its job.

    Raises:
        S3Error: the folder is there already, or SLURM refuses the script; then no folder is left behind.
    """
    run = runs.create(job, path, render(job, path))
    try:
        slurm.test_script(run.script)
        queue(run)
    except BaseException:
        if not run.job_ids:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return run


def queue(run: Run) -> None:
    """Queue the run's script: once, or with ``restart.how: chain`` as often as it may start."""
    restart = run.job.cluster.restart
    for _ in range(restart.max_restarts + 1 if restart.how == "chain" else 1):
        job = slurm.submit(run.script)
        try:
            run.submitted(job)
        except OSError as error:  # no command would find the job again
            slurm.cancel([job])
            raise S3Error(
                f"job {job} was taken out of the queue again, for {run.jobs} cannot be written: {error}"
            ) from error


def here(job: Job) -> Job:
    """``job`` for this terminal: with this interpreter, and paths that hold wherever it is resumed."""
    cluster = job.cluster
    python = sys.executable if cluster.python == "python" else cluster.python
    update = {"python": python, "data_dir": str(Path(cluster.data_dir).resolve())}
    return Job(job.recipe, cluster.model_copy(update=update))


def start(run: Run) -> int:
    """Run the script of a job without a scheduler, to its end; returns its exit code, see docs/jobs.md.

    What it prints is printed, and appended to the run's logs/job.log. SIGINT, SIGTERM and SIGHUP are passed on to it:
    it ends, and saves before unless it is SIGINT.
    """
    command = ["bash", str(run.script)]
    pipe = subprocess.PIPE
    with run.job_log.open("ab", buffering=0) as log, _passing_on() as to:
        with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT) as script:
            to(script)
            assert script.stdout is not None
            for text in script.stdout:
                with suppress(OSError):  # a full disk costs the log a line, not the run
                    log.write(text)
                with suppress(OSError):  # a terminal that was closed: the run is none of its
                    sys.stdout.buffer.write(text)
                    sys.stdout.flush()
    return script.returncode


@contextmanager
def _passing_on() -> Iterator[Callable[["subprocess.Popen[bytes]"], None]]:
    """Pass what ends a command on to the script that is handed over: it would train on by itself, where no one sees it.

    What comes before a script is there reaches it then. Ctrl-C of a terminal reaches it as well, and it takes two for
    one; but what it says of its end must be read. A signal that is ignored stays so, as under nohup.
    """
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in endings if signal.getsignal(number) != signal.SIG_IGN]
    scripts: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if not scripts:
            early.append(number)
        for script in scripts:
            script.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def to(script: "subprocess.Popen[bytes]") -> None:
        scripts.append(script)
        for number in early:
            pass_on(number, None)

    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume(run: Run, show: Callable[[str], None]) -> int:
    """Let an ended run go on from its newest checkpoint: forget why it ended, and queue or start its script again.

    What was edited in its recipe.yaml or cluster.yaml is applied, and handed to ``show``, a line for each key. Returns
    the exit code of a run without a scheduler, 0 for a queued one.

    Raises:
        S3Error: it has finished, is still in the queue, SLURM does not answer, or it was edited where a run cannot
            change.
    """
    if run.finished:
        raise S3Error(
            f"{run.path.name} has finished: to train on, raise schedule.train_iters in {run.recipe}, remove "
            f"{run.path / FINISHED}, and resume"
        )
    if alive := _alive(run):
        raise S3Error(f"{run.path.name} is still in the queue as job {', '.join(alive)}: cancel it first")
    for change in edits.apply(run):
        show(f"changed since the last start: {change}")
    run.reopen()
    if run.job.cluster.scheduler == "none":
        return start(run)
    queue(run)
    return 0


def cancel(run: Run) -> list[str]:
    """End the run now, for good until ``resume``: what it did since its last checkpoint is lost.

    Returns the numbers of the jobs that were in the queue.

    Raises:
        S3Error: it has no job in the queue, or SLURM does not answer.
    """
    alive = _alive(run)
    if not alive:
        raise S3Error(f"{run.path.name} has no job in the queue: see s3-megatron status {run.label}")
    if not run.finished and run.ended is None:
        run.end("cancelled with s3-megatron cancel")
    slurm.cancel(alive)
    return alive


def _alive(run: Run) -> list[str]:
    return [job for job, found in slurm.states(run.job_ids, run.path / BATCH_SCRIPT).items() if found.alive]
