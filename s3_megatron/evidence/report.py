"""report.md: an experiment's figures, each from cells that are named, and what is missing."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from s3_megatron.evidence import analysis, horizons, tables
from s3_megatron.evidence.analysis import Analysis
from s3_megatron.evidence.experiments import Experiment
from s3_megatron.files import write_file


def write(experiment: Experiment, folder: Path) -> Path:
    """Write report.md and pictures beside a folder's cells.jsonl; returns the report's path.

    Raises:
        S3Error: there are no cells of this experiment, or the disk is full.
    """
    head, found = analysis.read(folder / "cells.jsonl", experiment)
    try:
        from s3_megatron.evidence import pictures

        drawn = pictures.draw(found, folder)
    except ModuleNotFoundError as error:  # a machine that was lent for the runs need not draw
        drawn = [f"no pictures: {error}"]
    write_file(folder / "report.md", render(head, found, drawn).encode())
    return folder / "report.md"


def render(head: Mapping[str, str], found: Analysis, pictures: Sequence[str] = ()) -> str:
    """Lay out the report."""
    experiment = found.experiment
    parts = [f"# {experiment.title}", state(found), "\n".join(origin(head, found))]
    for setup in experiment.setups:
        title = _at(found, setup)
        parts += list(suspects(found, setup))
        if experiment.tuning:
            parts += [f"## Best configurations{title}", *tuning(found), tables.best(found, setup)]
            parts += [f"## Differences to {experiment.reference}{title}", tables.differences(found, setup)]
        elif any(found.best(name, setup) for name in experiment.contenders):
            parts += [f"## Best rates{title}", tables.best_of_rates(found, setup)]
        if any(row.results for row in found.rows if row.setup == setup):
            parts += [f"## By rate{title}", tables.by_rate(found, setup)]
            if any(len(found.by_rate(name, setup)) > 1 for name in experiment.contenders):
                parts += [f"## Width{title}", tables.widths(found, setup)]
    if ratios := list(horizons.ratios(found)):
        parts += ["## Steps ratio", tables.steps_ratio(found, ratios)]
    if recoveries := found.recoveries():
        parts += ["## Recovery", tables.recovered(recoveries)]
    if experiment.paper:
        parts += ["## The paper's figures", tables.paper(experiment)]
    parts += [f"![{name}]({name})" if name.endswith(".png") else name for name in pictures]
    if missing := list(not_run(found)):
        parts += ["## Not run yet", "\n".join(missing)]
    if found.finished:
        parts += ["## Cells", tables.cells(found)]
    return "\n\n".join(parts) + "\n"


def state(found: Analysis) -> str:
    """Say how far the experiment is, and what it ranks: the report's first sentence, and README's."""
    whole = f"{found.finished} of {found.total} cells."
    if found.experiment.tuning is None:
        return f"{whole} Nothing is ranked here: rates were not tuned by equal budgets."
    ranked = [r for setup in found.experiment.setups for r in found.ranking(setup)]
    of_all = [r for r in ranked if r.paired.pairs == r.wanted]
    if not of_all:
        return f"{whole} Nothing is ranked yet: no pair has all of its seeds."
    reference = found.experiment.reference
    verdicts = "; ".join(f"{r.contender}{_at(found, r.setup)}: {r.verdict}" for r in of_all)
    return f"{whole} {len(of_all)} of {len(ranked)} pairs are ranked; {reference} against {verdicts}."


def _at(found: Analysis, setup: str) -> str:
    return f" ({setup})" if len(found.experiment.setups) > 1 else ""


def origin(head: Mapping[str, str], found: Analysis) -> list[str]:
    """Say by which rules, code and machines the cells came about."""
    lines = [f"- {what}: {head.get(what)}" for what in ("experiment", "rules", "text", "code")]
    results = list(found.results.values())
    for what in ("commit", "card", "versions"):
        values = sorted({str(result.get(what)) for result in results}) or [str(head.get(what))]
        lines.append(f"- {what}: {'; '.join(values)}")
    hours = sum(result["seconds"] for result in results) / 3600
    return [*lines, f"- hours of training: {hours:.2f}"]


def suspects(found: Analysis, setup: str) -> Iterable[str]:
    """A line for each contender that is implausibly far behind the others."""
    for name, gap in found.far_behind(setup).items():
        yield (
            f"**Look for a fault first: {name}{_at(found, setup)} is {gap:.2f} nats behind the median of the others.** "
            "At its best rate a working optimizer hardly is; until that is explained, no figure here speaks against it."
        )


def tuning(found: Analysis) -> Iterable[str]:
    """Say over which seeds was tuned, where they are several."""
    by = found.experiment.tuning
    if by and by.seeds:
        seeds = ", ".join(map(str, by.seeds))
        yield f"Chosen by {tables.tuned_by(found)} ({seeds}), of {by.configurations} configurations a contender."


def not_run(found: Analysis) -> Iterable[str]:
    """Name what is missing, a line a contender and setup."""
    budget = found.experiment.tuning
    for name, setup in found.plan.pairs():
        rows = [row for row in found.rows if (row.contender, row.setup) == (name, setup)]
        parts = []
        if budget and (tried := sum(len(row.results) for row in rows if row.tuning)) < budget.runs:
            parts.append(f"{tried} of {budget.runs} tuning runs are finished")
        final = [row for row in rows if not row.tuning]
        if not final:
            parts.append("no final run can start before")
        parts += [f"{len(row.results)} of {row.wanted} seeds at rate {row.rate:g}" for row in final if not row.is_whole]
        if parts:
            yield f"- {name}{_at(found, setup)}: {', '.join(parts)}"
