"""How a run is, from its folder and SLURM's queue."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from s3_megatron.checkpoints.whole import Newest, newest
from s3_megatron.errors import S3Error
from s3_megatron.jobs import slurm
from s3_megatron.jobs.node import verdict
from s3_megatron.jobs.runs import Run
from s3_megatron.run_folder import BATCH_SCRIPT, Attempt
from s3_megatron.watch.events import Train
from s3_megatron.watch.file import FILE_NAME, newest_train

# Iterations that the speed is the median of.
RECENT = 20
# A run without a scheduler that has written nothing for so many seconds may be gone.
QUIET = 600


@dataclass(frozen=True)
class Status:
    """What a person wants to know of a run; None is what is not known yet."""

    run: Run
    state: str
    iteration: int
    iterations: int
    loss: float | None
    tokens_per_second: float | None
    saved: Newest
    restarts: int
    error: str | None  # what failed first when the run last stopped


def status(run: Run) -> Status:
    """Read how ``run`` is."""
    recipe = run.job.recipe
    train = newest_train(run.watch, RECENT)
    recent = [event.seconds for event in train if event.seconds is not None]  # the first of a start has none
    tokens = recipe.schedule.global_batch_size * recipe.model.seq_length
    last = train[-1] if train else Train(iteration=0)
    attempts = run.attempts()
    return Status(
        run=run,
        state=_state(run, attempts),
        iteration=last.iteration,
        iterations=recipe.schedule.train_iters,
        loss=last.losses.get("lm_loss"),
        tokens_per_second=tokens / statistics.median(recent) if recent else None,
        saved=newest(run.checkpoints),
        restarts=max(0, len(attempts) - 1),
        error=None if run.finished else _first_error(attempts),
    )


def table(found: Status) -> Table:
    """One run, a fact a line."""
    rows, saved = Table(show_header=False, box=None), found.saved
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    facts = {
        "run": found.run.path.name,
        "state": found.state,
        "iteration": f"{found.iteration:,} of {found.iterations:,}",
        "loss": _or_dash(found.loss, ".4f"),
        "tokens/s": _or_dash(found.tokens_per_second, ",.0f"),
        "checkpoint": "none" if saved.iteration is None else f"iteration {saved.iteration:,}, {_age(saved.age)} ago",
        **({"torn": saved.torn_text} if saved.torn else {}),
        "restarts": str(found.restarts),
        "first error": found.error or "none",
        "jobs": ", ".join(found.run.job_ids) or "-",
        "folder": str(found.run.path),
    }
    for name, value in facts.items():
        rows.add_row(name, escape(value))
    return rows


def overview(runs: Sequence[Run]) -> Table:
    """Every run, one a line."""
    rows = Table(box=None, caption=None if runs else "no runs yet: s3-megatron submit, or launch")
    for heading in ("run", "state", "iteration", "loss", "checkpoint", "restarts"):
        rows.add_column(heading, overflow="fold")  # a name that is cut off is none
    for run in runs:
        try:
            found = status(run)
        except (S3Error, OSError) as error:  # the others are to be seen all the same
            rows.add_row(escape(run.label), escape(f"cannot be read: {error}"))
            continue
        rows.add_row(
            escape(found.run.label),
            escape(found.state),
            f"{found.iteration:,}/{found.iterations:,}",
            _or_dash(found.loss, ".4f"),
            "-" if found.saved.iteration is None else f"{found.saved.iteration:,}, {_age(found.saved.age)} ago",
            str(found.restarts),
        )
    return rows


def _state(run: Run, attempts: Sequence[Attempt]) -> str:
    if run.finished:
        return "finished"
    if (why := run.ended) is not None:
        return f"ended: {why}"
    if run.job.cluster.scheduler == "none":
        return _local_state(run, attempts)
    try:
        queued = slurm.states(run.job_ids, run.path / BATCH_SCRIPT)
    except S3Error as error:
        return f"unknown: {error}"
    last = "unless on another cluster (SLURM here knows none of its jobs)"
    for job, found in queued.items():
        if found.alive:
            why = f" ({found.reason})" if found.state == "PENDING" else f" on {found.nodes}"
            if found.reason.startswith("JobHeld"):  # as a controller leaves it that dies while a start leaves nodes out
                why = f" ({found.reason}): 'scontrol release {job}' lets it start"
            return f"{found.state.lower()} as job {job}{why}"
        last = f"job {job} is {found.state}"
    return f"stopped, {last}: s3-megatron resume {run.label}"


def _local_state(run: Run, attempts: Sequence[Attempt]) -> str:
    if not attempts:
        return f"not started: s3-megatron resume {run.label}"
    if verdicts := list(verdict.read(attempts[-1]).values()):
        return f"stopped ({verdicts[0]['verdict']}): s3-megatron resume {run.label}"
    signs = (attempts[-1].path, run.watch / FILE_NAME)
    silent = time.time() - max(path.stat().st_mtime for path in signs if path.exists())
    return "running" if silent < QUIET else f"silent for {_age(silent)}: killed? s3-megatron resume {run.label}"


def _first_error(attempts: Sequence[Attempt]) -> str | None:
    """What failed first in the last attempt that failed; of all nodes' verdicts, the earliest error."""
    for attempt in reversed(attempts):
        errors = [one["error"] for one in verdict.read(attempt).values() if one["error"] is not None]
        if errors:
            first = min(errors, key=lambda error: error["time"])
            rank = "" if first["rank"] is None else f"rank {first['rank']} on "
            return f"{rank}{first['host']}: {first['message']}"
        if bad := attempt.bad_nodes():
            return "; ".join(bad)
    return None


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _age(seconds: float) -> str:
    seconds = max(0, seconds)  # a file server's clock may be ahead of this machine's
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
