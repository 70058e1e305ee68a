"""A rehearsal: a recipe in its own layout but small, on this machine's CPUs, with a kill and a resume."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from s3_megatron.errors import S3Error
from s3_megatron.jobs.cluster import Cluster, Watchdog
from s3_megatron.jobs.forecast import Forecast, work
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.process import END_SOON
from s3_megatron.jobs.progress import print_line
from s3_megatron.jobs.recipe import AdamW, Data, Model, OwnOptimizer, Recipe
from s3_megatron.jobs.trial import Trial
from s3_megatron.run_folder import RunFolder
from s3_megatron.watch.file import read_metrics

MOST_COPIES = 2  # they shard the optimizer as any number of them does
MOST_RANKS = 8  # each takes about 0.7 GB and, at its start, a core for 5 to 10 seconds
ITERATIONS, SAVE_INTERVAL, KILL_AT = 12, 4, 6
SOFT_START = 0.25  # of what softens: soft from iteration 4 on, whose checkpoint the resume goes on from
# Of a recipe's own Megatron flags, those that are known to work without a GPU.
REHEARSABLE_FLAGS = ("--overlap-grad-reduce", "--overlap-param-gather")
# Settings that are shown although the rehearsal keeps them: what it is about.
_KEPT = (
    *("engine", "deepspeed", "precision", "optimizer.name", "optimizer.lr", "layout.tensor", "layout.pipeline"),
    *("layout.recompute", "model.attention_dropout", "model.hidden_dropout", "schedule.clip_grad"),
)


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found; ``loss_gap`` is the largest difference of a training loss after the resume."""

    ranks: int
    iterations_lost: int
    loss_gap: float
    seconds: float


def rehearse(job: Job, folder: Path, console: Console) -> Rehearsal:
    """Train ``job`` scaled down, undisturbed and then through the loss of a rank, by the script that a job has.

    The two runs stay in ``folder``. The ranks see no GPU.

    Raises:
        S3Error: the layout needs too many ranks, training fails, more iterations than a save interval are lost, or a
            loss after the resume is not that of the undisturbed run, bit for bit.
    """
    started = time.monotonic()
    small = scaled_down(job)
    console.print(_table(job, small))
    name = f"{job.recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    again = KILL_AT - KILL_AT // SAVE_INTERVAL * SAVE_INTERVAL  # iterations that the resume does once more
    forecast = Forecast(partial(print_line, console), starts=3, work=2 * work(small.recipe.schedule) + again)
    whole = Trial.of(small, folder / f"{name}-undisturbed", "undisturbed", forecast)
    killed = Trial.of(small, folder / f"{name}-killed", "one rank killed", forecast)
    whole.train(console)
    interruption = killed.train_through_a_kill(KILL_AT, console)
    first, second = RunFolder(whole.run), RunFolder(killed.run)
    gap = interruption.loss_gap(read_metrics(first.watch), read_metrics(second.watch))
    found = Rehearsal(small.ranks, interruption.iterations_lost, gap, time.monotonic() - started)
    console.print(
        f"{found.ranks} ranks; {found.iterations_lost} iterations lost, of at most {SAVE_INTERVAL}; largest difference "
        f"of a loss after the resume: {gap:g}; {found.seconds:.0f} seconds"
    )
    if found.iterations_lost > SAVE_INTERVAL:
        raise S3Error(
            f"the resume lost more than the {SAVE_INTERVAL} iterations between two saves: see {second.job_log}"
        )
    if gap:
        raise S3Error(f"a resume changes the losses of this recipe: compare {first.watch} and {second.watch}")
    return found


def scaled_down(job: Job) -> Job:
    """The rehearsal of ``job``: same engine, optimizer, precision and layout, with everything else as small as it goes.

    Context and sequence parallelism are left out: they need GPUs (docs/rehearsal.md).

    Raises:
        S3Error: one copy of the model has more ranks than a rehearsal.
    """
    recipe, layout = job.recipe, job.recipe.layout
    copy = layout.tensor * layout.pipeline
    if copy > MOST_RANKS:
        raise S3Error(
            f"layout.tensor x layout.pipeline is {copy} ranks, and a rehearsal has at most {MOST_RANKS}: rehearse with "
            "less of one, such as --set layout.pipeline=1"
        )
    copies = max(1, min(job.data_parallel, MOST_COPIES, MOST_RANKS // copy))
    micro_batch = min(job.micro_batch_size, 2)
    schedule = {
        "global_batch_size": 2 * micro_batch * copies,
        "micro_batch_size": micro_batch,
        "train_iters": ITERATIONS,
        "lr_decay_iters": None,
        "lr_wsd_decay_iters": recipe.schedule.lr_wsd_decay_iters and SAVE_INTERVAL,
        "lr_warmup_iters": min(recipe.schedule.lr_warmup_iters, 2),
        "eval_interval": KILL_AT,
        "eval_iters": min(recipe.schedule.eval_iters, 1),
    }
    flags = [flag for flag in recipe.flags if flag in REHEARSABLE_FLAGS]
    small = recipe.model_copy(
        update={
            "model": _small_model(recipe),
            "data": Data(mock=True),
            "optimizer": _short(recipe.optimizer),
            "schedule": recipe.schedule.model_copy(update=schedule),
            "layout": layout.model_copy(update={"nodes": 1, "context": 1, "sequence_parallel": False}),
            "checkpoint": recipe.checkpoint.model_copy(
                update={"save_interval": SAVE_INTERVAL, "save_retain_interval": None}
            ),
            "log": recipe.log.model_copy(update={"log_interval": 1}),
            "flags": tuple(flags),
        }
    )
    return Job(small, _this_machine(copy * copies))


def _short(chosen: OwnOptimizer | AdamW) -> OwnOptimizer | AdamW:
    """An optimizer for so short a run: what counts steps is of the whole one, and what softens has done so by the kill.

    By the usual share, .9, the only soft step of 12 was the first, which is hard.
    """
    if not isinstance(chosen, OwnOptimizer):
        return chosen
    given = chosen.spec.hyperparameters
    short = {each.name: each.default for each in given if each.kind is int and not each.defines_state}
    soft_start: float = getattr(chosen, "soft_start", 1.0)
    if soft_start < 1:
        short["soft_start"] = min(soft_start, SOFT_START)
    return chosen.model_copy(update=short)


def _small_model(recipe: Recipe) -> Model:
    """A model of the same kind whose layers and heads the layout divides."""
    model, layout = recipe.model, recipe.layout
    heads = max(2, layout.tensor)
    sizes = {
        "num_layers": max(2, layout.pipeline),
        "hidden_size": 16 * heads,
        "num_attention_heads": heads,
        "ffn_hidden_size": None,
        "seq_length": min(model.seq_length, 32),
        "vocab_size": min(model.vocab_size, 512),
    }
    return model.model_copy(update=sizes)


def _this_machine(ranks: int) -> Cluster:
    return Cluster(
        name="rehearsal",
        scheduler="none",
        accelerator="cpu",
        ranks_per_node=ranks,
        python=sys.executable,
        runs_dir=".",
        data_dir=".",
        environment={"CUDA_VISIBLE_DEVICES": "", **END_SOON},
        watchdog=Watchdog(start_minutes=10, hang_minutes=5),
    )


def _table(job: Job, small: Job) -> Table:
    """What the rehearsal keeps, and what it scales down."""
    table = Table(
        title=f"{job.recipe.name} for {job.cluster.name}, rehearsed on {small.ranks} processes", title_justify="left"
    )
    table.add_column("")
    table.add_column("recipe", overflow="fold")
    table.add_column("rehearsal", overflow="fold")
    before, after = _settings(job), _settings(small)
    for key, value in before.items():
        if value != after[key]:
            table.add_row(key, value, after[key])
        elif key in _KEPT:
            table.add_row(key, value, "the same")
    return table


def _settings(job: Job) -> dict[str, str]:
    """What of ``job`` a person compares."""
    parallel = {"ranks": str(job.ranks), "data-parallel copies": str(job.data_parallel)}
    data = {"data": "random tokens" if job.recipe.data.mock else "files"}
    others = {key: _text(value) for key, value in _flat(job.recipe) if not key.startswith("data.")}
    if job.recipe.engine != "deepspeed":
        del others["deepspeed"]
    return parallel | data | others


def _flat(section: BaseModel) -> Iterator[tuple[str, Any]]:
    for key, value in section:
        if isinstance(value, BaseModel):
            yield from ((f"{key}.{inner}", setting) for inner, setting in _flat(value))
        else:
            yield key, value


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))
