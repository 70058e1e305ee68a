"""The picture of the demonstration: losses, and how far each optimizer moves the weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from s3_megatron.demo.engines import ENGINES
from s3_megatron.demo.report import NOTE, Outcome, title
from s3_megatron.watch.events import Evaluation, Train

OUR_COLOR, THEIR_COLOR, MARK_COLOR = "#0b6e99", "#d1670a", "#b3262b"


def draw(path: Path, outcome: Outcome, report: Mapping[str, Any]) -> None:
    """Write the picture as PNG beside ``path`` and move it there."""
    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, updates = figure.subplots(1, 2)
    _losses(losses, outcome, report)
    _updates(updates, outcome, report)
    for axes in (losses, updates):
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, max(outcome.ours.train) * 1.01)
    ours, theirs = report["optimizers"]
    model = report[ours]
    figure.suptitle(
        f"GPT-2 with {model['parameters'] / 1e6:.1f}M weights in {ENGINES[report['engine']].title}, "
        f"{model['world_size']} ranks: {title(ours)} and {title(theirs)}",
        fontsize=12,
    )
    figure.supxlabel(NOTE, fontsize=8, color="#555555")
    beside = path.with_suffix(".tmp")
    figure.savefig(beside, format="png")
    os.replace(beside, path)


def _losses(axes: Axes, outcome: Outcome, report: Mapping[str, Any]) -> None:
    resume = report["resume"]
    ours, theirs = report["optimizers"]
    for metrics, color, name in ((outcome.theirs, THEIR_COLOR, theirs), (outcome.ours, OUR_COLOR, ours)):
        label = f"{title(name)}, validation {report[name]['val_loss']:.3f} at the end"
        iterations, losses = _losses_of(metrics.train)
        axes.plot(iterations, losses, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(iterations, _smooth(losses), color=color, linewidth=1.8, label=label)
        axes.plot(*_losses_of(metrics.validation), "o", color=color, markersize=6, markeredgecolor="white")
    iterations, losses = _losses_of(outcome.resumed.train)
    again = [(i, loss) for i, loss in zip(iterations, _smooth(losses), strict=True) if i > resume["resumed_from"]]
    label = f"{title(ours)} after kill and resume, largest gap {resume['loss_gap']:g}"
    axes.plot(*zip(*again, strict=True), color="black", linewidth=1.2, linestyle=(0, (1, 2)), label=label)
    axes.axvspan(resume["resumed_from"], resume["killed_at"], color=MARK_COLOR, alpha=0.10, linewidth=0)
    axes.axvline(resume["killed_at"], color=MARK_COLOR, linewidth=1)
    axes.annotate(
        f"rank killed at {resume['killed_at']},\nresumed from {resume['resumed_from']}",
        (resume["killed_at"], 0.62),
        xycoords=("data", "axes fraction"),
        xytext=(6, 0),
        textcoords="offset points",
        color=MARK_COLOR,
        fontsize=9,
    )
    axes.set_title("training loss (lines) and validation loss (dots)", fontsize=10, loc="left")
    axes.set_ylabel("cross entropy per token, nats")
    axes.legend(frameon=False, fontsize=9)


def _updates(axes: Axes, outcome: Outcome, report: Mapping[str, Any]) -> None:
    ours, theirs = map(title, report["optimizers"])
    for metrics, color, name in ((outcome.theirs, THEIR_COLOR, theirs), (outcome.ours, OUR_COLOR, ours)):
        for key, style in (("largest", "-"), ("mean", "--")):
            sizes = {
                i: each.updates.max if key == "largest" else each.updates.mean for i, each in metrics.train.items()
            }
            series = _series(sizes)
            axes.plot(*series, color=color, linewidth=1.3, linestyle=style, label=f"{name}, {key}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(1, color="black", linewidth=1)
    axes.text(0.99, 1.04, f"{ours}'s bound: 1", transform=axes.get_yaxis_transform(), ha="right", fontsize=9)
    axes.set_title("|update| of the weights, in units of the learning rate", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, ncols=2)


def _smooth(values: list[float], window: int = 15) -> list[float]:
    """The mean of up to ``window`` values around each."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _losses_of(events: Mapping[int, Train] | Mapping[int, Evaluation]) -> tuple[list[int], list[float]]:
    return _series({i: event.losses["lm_loss"] for i, event in events.items()})


def _series(values: Mapping[int, float | None]) -> tuple[list[int], list[float]]:
    points = [(i, value) for i, value in sorted(values.items()) if value is not None]
    return [i for i, _ in points], [value for _, value in points]
