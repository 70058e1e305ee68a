"""What the demonstration found: report.json and a table, from the metrics files of its three runs."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import s3_megatron
from s3_megatron import machine
from s3_megatron.demo.engines import ENGINES
from s3_megatron.errors import S3Error
from s3_megatron.jobs.recipe import AdamW, OwnOptimizer, Recipe
from s3_megatron.jobs.trial import Interruption
from s3_megatron.optim import registry
from s3_megatron.run_folder import RunFolder
from s3_megatron.watch.events import Evaluation, Train
from s3_megatron.watch.file import Metrics, read_metrics

NOTE = "One seed, one rate each, a tiny model: a demonstration that it works, not evidence that either is better."


def title(optimizer: str) -> str:
    """What a person calls an optimizer of the demonstration."""
    return "AdamW" if optimizer == "adamw" else registry.title(optimizer)


@dataclass(frozen=True)
class Outcome:
    """The metrics of the three runs, the optimizer's, once more with a kill, its rival's; and the interruption."""

    ours: Metrics
    resumed: Metrics
    theirs: Metrics
    interruption: Interruption

    @classmethod
    def read(cls, folder: Path, names: tuple[str, str], interruption: Interruption) -> "Outcome":
        """Read the runs of ``names`` under ``folder``, and the first's "-killed"; raises S3Error if one did not end."""
        first, second = names
        ours, resumed, theirs = (_complete(folder / name) for name in (first, f"{first}-killed", second))
        return cls(ours, resumed, theirs, interruption)


def _complete(folder: Path) -> Metrics:
    metrics = read_metrics(RunFolder(folder).watch)
    for part in ("optimizer", "train", "validation"):
        if not getattr(metrics, part):
            raise S3Error(f"{folder} has no {part} event in its metrics: the run did not end; see its logs/job.log")
    return metrics


def summarize(
    outcome: Outcome, ours: Recipe, theirs: Recipe, *, gpus: int, corpus: Mapping[str, Any]
) -> dict[str, Any]:
    """Build what report.json holds; the recipes differ in their optimizers alone."""
    interruption = outcome.interruption
    return {
        "note": NOTE,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "s3-megatron": s3_megatron.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ENGINES[ours.engine].packages},
        },
        "engine": ours.engine,
        "machine": {
            "cores": machine.cores(),
            "gpus": gpus,
            "backend": "nccl" if gpus else "gloo, rehearsal",
        },
        "corpus": dict(corpus),
        "seed": ours.schedule.seed,
        "model": ours.model.model_dump(),
        "schedule": ours.schedule.model_dump(),
        "optimizers": [ours.optimizer.name, theirs.optimizer.name],
        ours.optimizer.name: {**_numbers(ours.optimizer), **_figures(outcome.ours)},
        theirs.optimizer.name: {**_numbers(theirs.optimizer), **_figures(outcome.theirs)},
        "resume": {
            "killed_at": interruption.killed_at,
            "resumed_from": interruption.resumed_from,
            "iterations_lost": interruption.iterations_lost,
            "loss_gap": interruption.loss_gap(outcome.ours, outcome.resumed),
            "val_loss": _last(outcome.resumed.validation).losses["lm_loss"],
        },
    }


def _numbers(optimizer: OwnOptimizer | AdamW) -> dict[str, Any]:
    if isinstance(optimizer, AdamW):
        own: dict[str, Any] = {"betas": [optimizer.beta1, optimizer.beta2]}
    else:
        own = optimizer.model_dump(include={"beta", "p", "soft_start"})
    return {"lr": optimizer.lr, "weight_decay": optimizer.decay, **own}


def _figures(metrics: Metrics) -> dict[str, Any]:
    updates = [event.updates for event in metrics.train.values()]
    described = ("wrapper", "world_size", "parameters", "shard_elements")
    sizes = ("state_bytes_per_param_rank", "master_bytes_per_param_rank")
    return {
        "val_loss": _last(metrics.validation).losses["lm_loss"],
        "train_loss": _last(metrics.train).losses["lm_loss"],
        **{key: getattr(metrics.optimizer, key) for key in (*described, *sizes)},
        "largest_update": _largest(each.max for each in updates),
        "largest_mean_update": _largest(each.mean for each in updates),
    }


def _largest(sizes: Iterable[float | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return float(np.max(known)) if known else None  # NaN where one is, as in Interruption.loss_gap


def _last[T: (Train, Evaluation)](events: Mapping[int, T]) -> T:
    return events[max(events)]


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write ``report`` beside ``path`` and move it there."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def table(report: Mapping[str, Any]) -> Table:
    """The comparison a person reads."""
    both = [report[name] for name in report["optimizers"]]
    resume = report["resume"]
    rows = Table(
        title=f"GPT-2, {both[0]['parameters']:,} weights on {both[0]['world_size']} ranks, "
        f"{report['schedule']['train_iters']} iterations",
        caption=NOTE,
        title_justify="left",
        caption_justify="left",
    )
    rows.add_column("")
    for name in report["optimizers"]:
        rows.add_column(title(name), justify="right")
    for label, key, form in (
        ("peak learning rate", "lr", "{:g}"),
        ("weight decay", "weight_decay", "{:g}"),
        ("validation loss at the end", "val_loss", "{:.4f}"),
        ("largest |update| of any weight, in learning rates", "largest_update", "{:.3f}"),
        ("optimizer state, bytes per parameter per rank", "state_bytes_per_param_rank", "{:.2f}"),
        ("float32 masters, bytes per parameter per rank", "master_bytes_per_param_rank", "{:.2f}"),
    ):
        rows.add_row(label, *("-" if x[key] is None else form.format(x[key]) for x in both))
    rows.add_row("shard of each rank, elements", *("\n".join(f"{n:,}" for n in x["shard_elements"]) for x in both))
    rows.add_section()
    rows.add_row("one rank killed at iteration", str(resume["killed_at"]), "")
    rows.add_row(
        "resumed from iteration (iterations lost)", f"{resume['resumed_from']} ({resume['iterations_lost']})", ""
    )
    rows.add_row("loss gap to the uninterrupted run after that", f"{resume['loss_gap']:g}", "")
    return rows
