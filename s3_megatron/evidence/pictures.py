"""Pictures of an experiment: loss and spikes against the rate, differences over seeds, recovery from one gradient."""

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from s3_megatron.evidence.analysis import Analysis, Recovery
from s3_megatron.evidence.cells import Result
from s3_megatron.files import write_file

MARKERS = "osD^vP*X"
HEIGHT = 4.6  # inches of a row
MOST_NAMES = 16  # of contenders; of more, the foremost have colours and names
FOREMOST = 8
BEHIND: dict[str, Any] = {"color": "0.8", "linewidth": 0.8, "zorder": 1}


def draw(found: Analysis, folder: Path) -> list[str]:
    """Draw what the cells suffice for, into ``folder``; returns the names of the files.

    Raises:
        S3Error: the folder cannot be written.
    """
    drawn = []
    for name, picture in PICTURES.items():
        figure = Figure(figsize=(11, HEIGHT), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        if picture(found, figure):
            figure.suptitle(f"{found.experiment.title}: {found.finished} of {found.total} runs", fontsize=11)
            image = io.BytesIO()
            figure.savefig(image, format="png")
            write_file(folder / name, image.getvalue())
            drawn.append(name)
        elif (folder / name).exists():  # of other cells
            (folder / name).unlink()
    return drawn


def _rates(found: Analysis, figure: Figure) -> bool:
    setups = [setup for setup in found.experiment.setups if _has_rates(found, setup)]
    if not setups:
        return False
    spiked = any(row.spikes for row in found.rows)
    figure.set_figheight(HEIGHT * len(setups))
    grid = figure.subplots(len(setups), 1 + spiked, squeeze=False, sharex=True)
    for setup, (losses, *others) in zip(setups, grid, strict=True):
        runs = {name: by for name in found.experiment.contenders if (by := found.by_rate(name, setup))}
        at = f"{setup}: " if len(found.experiment.setups) > 1 else ""
        named = _draw_losses(found, runs, losses)
        least, most = (end(len(some) for by in runs.values() for some in by.values()) for end in (min, max))
        which = f"mean over seeds ({least} to {most})" if least < most else f"mean over seeds ({most})"
        if found.experiment.tuning:
            seeds = len(found.experiment.tuning.all_seeds)
            which = "one run each, the tuning seed's" if seeds == 1 else f"mean over {seeds} tuning seeds"
            which = f"{which}; faint: other settings"
        spikes = "" if spiked else "; no run had a spike"
        _dress(losses, f"{at}final validation loss, nats: {which}{spikes}", "peak rate")
        for axes in others:
            for name, by in runs.items():
                style = _style(found, name, named) if name in named else BEHIND
                axes.plot(list(by), [fmean(len(r["spikes"]) for r in some) for some in by.values()], **style)
            _dress(axes, f"{at}spikes a run", "peak rate")
            axes.set_ylim(bottom=0)
        for axes in (losses, *others):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
    return True


def _has_rates(found: Analysis, setup: str) -> bool:
    """Whether a contender was run at more than one rate."""
    tried = {(row.contender, row.rate) for row in found.rows if row.setup == setup and row.results}
    return len(tried) > len({name for name, _ in tried})


def _draw_losses(found: Analysis, runs: Mapping[str, dict[float, list[Result]]], axes: Axes) -> list[str]:
    """Draw final losses against rates; returns who has a colour and a name: all, or the lowest of too many."""
    reference, named = found.experiment.reference, list(found.experiment.contenders)
    means = {name: [fmean(r["final"] for r in some) for some in by.values()] for name, by in runs.items()}
    if is_crowded := len(named) > MOST_NAMES:
        named = [reference, *sorted(means.keys() - {reference}, key=lambda name: min(means[name]))[: FOREMOST - 1]]
    best = lowest = min(map(min, means.values()))
    for name, by in runs.items():
        style = _style(found, name, named) if name in named else BEHIND
        axes.plot(list(by), means[name], label=name if name in named else None, **style)
        if any(len(some) > 1 for some in by.values()) and (name == reference or not is_crowded):
            low, high = ([end(r["final"] for r in some) for some in by.values()] for end in (min, max))
            label = f"range of {name}'s seeds" if is_crowded else None
            axes.fill_between(list(by), low, high, label=label, color=style["color"], alpha=0.12, linewidth=0)
            lowest = min(lowest, *low)
        for row in found.rows:
            if row.tuning and row.contender == name and row.results[0] not in by.get(row.rate, []):
                axes.plot(row.rate, row.mean, **{**style, "alpha": 0.35})
    if is_crowded:
        axes.plot([], [], label=f"the other {len(runs) - len(named)}", **BEHIND)
    axes.set_ylim(lowest - 0.02, best + 0.5)  # what diverged is above
    axes.legend(frameon=False, fontsize=8)
    return named


def _differences(found: Analysis, figure: Figure) -> bool:
    setup = next(iter(found.experiment.setups))
    ranked = [r for r in found.ranking(setup) if r.paired.pairs > 1]
    if not ranked:
        return False
    axes, reference = figure.subplots(), found.experiment.reference
    for place, r in enumerate(ranked):
        theirs, ours = found.best(r.contender, setup), found.best(reference, setup)
        assert theirs is not None and ours is not None
        points = [loss - ours.losses[seed] for seed, loss in theirs.losses.items() if seed in ours.losses]
        style = _style(found, r.contender, [*found.experiment.contenders])
        axes.plot(points, [place] * len(points), "o", color=style["color"], alpha=0.35, markersize=5)
        axes.plot([r.paired.low, r.paired.high], [place, place], color=style["color"], linewidth=2.5)
        axes.plot([r.paired.mean], [place], "D", color=style["color"], markersize=7, markeredgecolor="white")
    axes.set_yticks(range(len(ranked)), [f"{r.contender}\n{reference} {r.verdict}" for r in ranked], fontsize=8)
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=1)
    title = f"final loss minus {reference}'s: seeds (dots), mean (diamond), 95% interval (line)"
    _dress(axes, title, f"nats; to the right {reference} is lower")
    return True


def _recovery(found: Analysis, figure: Figure) -> bool:
    recoveries = found.recoveries()
    if not recoveries:
        return False
    never = 1.06 * max(setup.steps - setup.kick_step for setup in found.experiment.setups.values())
    seeds = max(Counter((r.contender, r.kick) for r in recoveries).values())
    panels: dict[str, Callable[[list[Recovery]], float]] = {
        f"largest |u| of {seeds} seeds; dotted: 1 and 7.27": lambda some: max(r.largest for r in some),
        "steps until the loss is as without, median": lambda some: _median([r.loss for r in some], never),
        "steps until mean |u| is as without, median": lambda some: _median([r.update for r in some], never),
    }
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in found.experiment.contenders:
            kicks = sorted({r.kick for r in recoveries if r.contender == name})
            points = {k: value([r for r in recoveries if (r.contender, r.kick) == (name, k)]) for k in kicks}
            style = _style(found, name, [*found.experiment.contenders])
            axes.plot(list(points), list(points.values()), label=name, **style)
        is_steps = title.startswith("steps")
        for bound in (never,) if is_steps else (1, 7.27):
            axes.axhline(bound, color="black", linewidth=0.8, linestyle=":")
        if is_steps:
            axes.text(0.5, 0.945, "not within the run", transform=axes.transAxes, ha="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.1 * never if is_steps else None)
        _dress(axes, title, "one gradient times")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return True


def _median(steps: list[int | None], never: float) -> float:
    return median(never if value is None else value for value in steps)


PICTURES: dict[str, Callable[[Analysis, Figure], bool]] = {
    "rates.png": _rates,
    "differences.png": _differences,
    "recovery.png": _recovery,
}


def _style(found: Analysis, name: str, named: Sequence[str]) -> dict[str, Any]:
    """Draw ``name`` as no other of ``named``, up to ten."""
    place = named.index(name)
    color = colormaps["tab10"](place % 10)
    width = 2.2 if name == found.experiment.reference else 1.3
    return {"color": color, "marker": MARKERS[place % len(MARKERS)], "markersize": 4.5, "linewidth": width}


def _dress(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(label, fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
