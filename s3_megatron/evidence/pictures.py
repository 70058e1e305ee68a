"""Pictures of an experiment: loss and spikes against the rate, differences over seeds, recovery from one gradient."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from s3_megatron.evidence import analysis
from s3_megatron.evidence.analysis import Analysis
from s3_megatron.files import write_file

MARKERS = "osD^vP*X"
HEIGHT = 4.6  # inches of a row
MOST_NAMES = 16  # of contenders; of more, the foremost have colours and names
FOREMOST = 8
BEHIND = {"color": "0.8", "linewidth": 0.8, "zorder": 1}


def draw(found: Analysis, folder: Path) -> list[str]:
    """Draw what the cells suffice for, into ``folder``; returns the names of the files."""
    drawn = []
    for name, picture in PICTURES.items():
        figure = Figure(figsize=(11, HEIGHT), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        if picture(found, figure):
            figure.suptitle(f"{found.experiment.title}: {found.finished} of {found.total} cells", fontsize=11)
            image = io.BytesIO()
            figure.savefig(image, format="png")
            write_file(folder / name, image.getvalue())
            drawn.append(name)
        else:
            (folder / name).unlink(missing_ok=True)
    return drawn


def _rates(found: Analysis, figure: Figure) -> bool:
    drawn = {}
    for setup in found.experiment.setups:
        runs = {name: by for name in found.experiment.contenders if (by := found.by_rate(name, setup))}
        # One with a single rate is a point: while tuning goes on, the best settings may have no other.
        if any(len(by) > 1 for by in runs.values()):
            drawn[setup] = runs
    if not drawn:
        return False
    figure.set_figheight(HEIGHT * len(drawn))
    grid = figure.subplots(len(drawn), 2, squeeze=False, sharex=True)
    for (setup, runs), (losses, spikes) in zip(drawn.items(), grid, strict=True):
        means = {name: [fmean(map(analysis.final_loss, some)) for some in by.values()] for name, by in runs.items()}
        is_crowded = len(found.experiment.contenders) > MOST_NAMES
        named = list(found.experiment.contenders)
        if is_crowded:
            reference = found.experiment.reference
            named = [reference, *sorted(means.keys() - {reference}, key=lambda name: min(means[name]))[: FOREMOST - 1]]
        for name, by in runs.items():
            style = _style(found, name, named) if name in named else BEHIND
            losses.plot(list(by), means[name], label=name if name in named else None, **style)
            is_banded = not is_crowded or name == found.experiment.reference
            if is_banded and any(len(some) > 1 for some in by.values()):
                low = [min(map(analysis.final_loss, some)) for some in by.values()]
                high = [max(map(analysis.final_loss, some)) for some in by.values()]
                losses.fill_between(list(by), low, high, color=style["color"], alpha=0.15, linewidth=0)
            spikes.plot(list(by), [fmean(len(r["spikes"]) for r in some) for some in by.values()], **style)
        best = min(map(min, means.values()))
        losses.set_ylim(best - 0.02, best + 0.5)  # what diverged is above
        which = (
            "one run each, by the tuning seed" if found.experiment.tuning else "mean over the seeds, and their range"
        )
        if is_crowded:
            which = f"mean over the seeds, the lowest {len(named)} of {len(runs)}"
        at = f"{setup}: " if len(found.experiment.setups) > 1 else ""
        _dress(losses, f"{at}final validation loss, nats: {which}", "peak rate")
        _dress(spikes, f"{at}spikes a run", "peak rate")
        for axes in (losses, spikes):
            axes.set_xscale("log")
        spikes.set_ylim(bottom=0)
        losses.legend(frameon=False, fontsize=8)
    return True


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
    largest, steps = figure.subplots(1, 2)
    for name in found.experiment.contenders:
        kicks = sorted({r.kick for r in recoveries if r.contender == name})
        groups = [[r for r in recoveries if (r.contender, r.kick) == (name, kick)] for kick in kicks]
        style = _style(found, name, [*found.experiment.contenders])
        largest.plot(kicks, [max(r.largest for r in some) for some in groups], label=name, **style)
        waits = [median(math.nan if r.loss is None else r.loss for r in some) for some in groups]
        steps.plot(kicks, waits, **style)
    for axes in (largest, steps):
        axes.set_xscale("log")
    for bound in (1, 7.27):
        largest.axhline(bound, color="black", linewidth=0.8, linestyle=":")
    largest.legend(frameon=False, fontsize=8)
    _dress(largest, "largest |u| from the kick on; dotted: 1 and 7.27", "one gradient times")
    _dress(steps, "steps until the loss has recovered, median; none: not within the run", "one gradient times")
    return True


PICTURES: dict[str, Callable[[Analysis, Figure], bool]] = {
    "rates.png": _rates,
    "differences.png": _differences,
    "recovery.png": _recovery,
}


def _style(found: Analysis, name: str, named: Sequence[str]) -> dict[str, object]:
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
