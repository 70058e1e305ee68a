"""report.md: an experiment's figures, each from cells that are named, and what is missing."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from s3_megatron.evidence import findings, statistics
from s3_megatron.evidence.cells import Result
from s3_megatron.evidence.experiments import Experiment
from s3_megatron.evidence.findings import Findings, Ranked, Recovery
from s3_megatron.files import write_file

NOTHING = "-"


def write(experiment: Experiment, folder: Path) -> Path:
    """Write report.md and pictures beside a folder's cells.jsonl; returns the report's path.

    Raises:
        S3Error: there are no cells of this experiment, or the disk is full.
    """
    head, found = findings.read(folder / "cells.jsonl", experiment)
    try:
        from s3_megatron.evidence import pictures

        drawn = pictures.draw(found, folder)
    except ModuleNotFoundError as error:  # a machine that was lent for the runs need not draw
        drawn = [f"no pictures: {error}"]
    write_file(folder / "report.md", render(head, found, drawn).encode())
    return folder / "report.md"


def render(head: Mapping[str, str], found: Findings, pictures: Sequence[str] = ()) -> str:
    """Lay out the report."""
    experiment = found.experiment
    parts = [f"# {experiment.title}", state(found), "\n".join(origin(head, found))]
    for setup in experiment.setups:
        title = f" ({setup})" if len(experiment.setups) > 1 else ""
        if experiment.tuning:
            parts += [f"## Best configurations{title}", best(found, setup)]
            parts += [f"## Differences to {experiment.reference}{title}", differences(found, setup)]
        if any(row.results for row in found.rows if row.setup == setup):
            parts += [f"## By rate{title}", by_rate(found, setup), f"## Width{title}", widths(found, setup)]
    if recoveries := found.recoveries():
        parts += ["## Recovery", recovered(recoveries)]
    if experiment.paper:
        parts += ["## The paper's figures", paper(experiment)]
    parts += [f"![{name}]({name})" if name.endswith(".png") else name for name in pictures]
    if missing := list(not_run(found)):
        parts += ["## Not run yet", "\n".join(missing)]
    if found.finished:
        parts += ["## Cells", cells(found)]
    return "\n\n".join(parts) + "\n"


def state(found: Findings) -> str:
    """Say how far the experiment is, and what it ranks: the report's first sentence, and README's."""
    whole = f"{found.finished} of {found.total} cells."
    if found.experiment.tuning is None:
        return f"{whole} Nothing is ranked here: rates were not tuned by equal budgets."
    ranked = [r for setup in found.experiment.setups for r in found.ranking(setup)]
    of_all = [r for r in ranked if r.paired.pairs == r.wanted]
    if not of_all:
        return f"{whole} Nothing is ranked yet: no pair has all of its seeds."
    reference = found.experiment.reference
    said = "; ".join(f"{r.contender}{_at(found, r.setup)}: {r.verdict}" for r in of_all)
    return f"{whole} {len(of_all)} of {len(ranked)} pairs are ranked; {reference} against {said}."


def _at(found: Findings, setup: str) -> str:
    return f" ({setup})" if len(found.experiment.setups) > 1 else ""


def origin(head: Mapping[str, str], found: Findings) -> list[str]:
    """Say by which rules, code and machines the cells came about."""
    lines = [f"- {what}: {head.get(what)}" for what in ("experiment", "rules", "text", "code")]
    results = list(found.results.values())
    for what in ("commit", "card", "versions"):
        values = sorted({str(result.get(what)) for result in results}) or [str(head.get(what))]
        lines.append(f"- {what}: {'; '.join(values)}")
    hours = sum(result["seconds"] for result in results) / 3600
    return [*lines, f"- hours of training: {hours:.2f}"]


def best(found: Findings, setup: str) -> str:
    """The table of each contender's best configuration over the final seeds."""
    rows = []
    for name in found.experiment.contenders:
        row = next(iter(found.final(name, setup)), None)
        if row is None:
            rows.append([name, "is being tuned", *[NOTHING] * 6])
            continue
        losses = list(row.losses.values())
        edge = " (at the edge of the rates tried)" if found.at_edge(name, setup) else ""
        figures = [_figure(fmean(losses) if losses else math.nan), _figure(statistics.deviation(losses))]
        counts = [f"{len(losses)} of {row.wanted}", *figures, str(row.spikes), str(row.diverged)]
        rows.append([name, f"{row.rate:g}{edge}", _settings(row.settings), *counts])
    return table(["contender", "rate", "settings", "seeds", "mean", "std", "spikes", "diverged"], rows)


def differences(found: Findings, setup: str) -> str:
    """The table by which the reference is ranked against each rival."""
    rows = [[r.contender, f"{r.paired.pairs} of {r.wanted}", *_test(r), r.verdict] for r in found.ranking(setup)]
    note = (
        f"The rival's loss minus {found.experiment.reference}'s, seed by seed: positive speaks for "
        f"{found.experiment.reference}. Better or worse where the t-test's p of a difference of more than "
        f"{statistics.MARGIN:g}, adjusted by Holm, is below {statistics.ALPHA:g}."
    )
    beyond = f"p beyond {statistics.MARGIN:g}"
    tests = ["95% interval", "p", "p (Wilcoxon)", beyond, f"{beyond} (Holm)"]
    headings = ["rival", "seeds", "mean", *tests, found.experiment.reference]
    return f"{note}\n\n{table(headings, rows)}"


def _test(ranked: Ranked) -> list[str]:
    paired = ranked.paired
    interval = f"{_figure(paired.low)} to {_figure(paired.high)}" if paired.low == paired.low else NOTHING
    return [_figure(paired.mean), interval, *map(_p, (paired.p, paired.wilcoxon, paired.beyond, ranked.adjusted))]


def by_rate(found: Findings, setup: str) -> str:
    """The table of all configurations: loss, spikes and divergence against the rate."""
    rows = []
    for row in found.rows:
        if row.setup != setup or not row.results:
            continue
        losses = list(row.losses.values())
        kind = "tuning" if row.tuning else "final"
        figures = [_figure(fmean(losses)), _figure(statistics.deviation(losses))]
        counts = [f"{row.spikes / len(losses):.2f}", f"{row.diverged} of {len(losses)}"]
        rows.append([row.contender, _settings(row.settings), f"{row.rate:g}", kind, *figures, *counts])
    return table(["contender", "settings", "rate", "runs", "mean", "std", "spikes a run", "diverged"], rows)


def widths(found: Findings, setup: str) -> str:
    """The table of the rates that are as good as the best."""
    rows = []
    for name in found.experiment.contenders:
        if runs := found.by_rate(name, setup):
            w = statistics.width({rate: fmean(map(findings.final_loss, some)) for rate, some in runs.items()})
            low, high = "<= " * w.open_low + f"{w.low:g}", ">= " * w.open_high + f"{w.high:g}"
            rows.append([name, low, high, ">= " * (w.open_low or w.open_high) + f"{w.high / w.low:.3g}"])
    which = "at the best settings, by the tuning seed" if found.experiment.tuning else "over the seeds there are"
    note = f"Rates tried around the best whose loss is within {statistics.WITHIN:g} of it, {which}."
    return f"{note}\n\n{table(['contender', 'lowest', 'highest', 'ratio'], rows)}"


def recovered(recoveries: Iterable[Recovery]) -> str:
    """The table of steps after one gradient times K until the loss, and |u|, are as without."""
    ordered = sorted(recoveries, key=lambda r: (r.contender, r.kick))
    rows = []
    for (name, kick), group in itertools.groupby(ordered, key=lambda r: (r.contender, r.kick)):
        some = list(group)
        largest = f"{max(r.largest for r in some):.3g}"
        rows.append(
            [name, f"{kick:g}", str(len(some)), largest, _steps(r.loss for r in some), _steps(r.update for r in some)]
        )
    note = "Steps are medians over the seeds, with the least and the most; never: not within the run."
    headings = ["contender", "K", "seeds", "largest |u|", "steps, loss", "steps, mean |u|"]
    return f"{note}\n\n{table(headings, rows)}"


def _steps(values: Iterable[int | None]) -> str:
    steps = sorted(math.inf if value is None else value for value in values)
    middle, least, most = (f"{s:g}".replace("inf", "never") for s in (median(steps), steps[0], steps[-1]))
    return middle if least == most else f"{middle} ({least} to {most})"


def paper(experiment: Experiment) -> str:
    """The paper's own figures, as the experiment's file has them."""
    rows = [[name, figure] for name, figure in experiment.paper.items()]
    note = (
        "arXiv 2507.06464's, not ours: another model, other data, one run each. Its losses do not compare with these."
    )
    return f"{note}\n\n{table(['contender', 'the paper'], rows)}"


def not_run(found: Findings) -> Iterable[str]:
    """Name what is missing, a line a contender and setup."""
    tuning = found.experiment.tuning
    for name, setup in found.plan.pairs():
        rows = [row for row in found.rows if (row.contender, row.setup) == (name, setup)]
        parts = []
        if tuning and (tried := sum(row.tuning for row in rows)) < tuning.runs:
            parts.append(f"{tried} of {tuning.runs} tuning runs are finished")
        final = [row for row in rows if not row.tuning]
        if not final:
            parts.append("no final run can start before")
        parts += [
            f"{len(row.results)} of {row.wanted} seeds at rate {row.rate:g}"
            for row in final
            if len(row.results) < row.wanted
        ]
        if parts:
            yield f"- {name}{_at(found, setup)}: {', '.join(parts)}"


def cells(found: Findings) -> str:
    """The table of single runs: key, what it is, and its loss."""
    order = {name: place for place, name in enumerate(found.experiment.contenders)}
    ordered = sorted(found.results.values(), key=lambda r: (r["setup"], order[r["contender"]], r["rate"], r["seed"]))
    rows = [
        [
            *(r["key"], r["setup"], r["contender"], f"{r['rate']:g}", _settings(json.dumps(r["settings"]))),
            *(str(r["seed"]), _figure(findings.final_loss(r)), str(len(r["spikes"])), _diverged(r)),
        ]
        for r in ordered
    ]
    headings = ["cell", "setup", "contender", "rate", "settings", "seed", "loss", "spikes", "diverged in step"]
    return table(headings, rows)


def table(headings: list[str], rows: Iterable[list[str]]) -> str:
    """Lay out a table of Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _diverged(result: Result) -> str:
    return NOTHING if result["diverged"] is None else str(result["diverged"])


def _settings(settings: str) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in json.loads(settings).items()) or NOTHING


def _figure(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.4f}"


def _p(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2g}"
