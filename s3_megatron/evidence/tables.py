"""The tables of an experiment's report, as Markdown; each figure follows from cells by analysis.py."""

import itertools
import json
import math
from collections.abc import Iterable
from statistics import median

from s3_megatron.evidence import statistics
from s3_megatron.evidence.analysis import Analysis, Ranked, Recovery
from s3_megatron.evidence.cells import Result
from s3_megatron.evidence.experiments import Experiment
from s3_megatron.evidence.horizons import Ratio
from s3_megatron.evidence.statistics import Paired

NOTHING = "-"


def best(found: Analysis, setup: str) -> str:
    """The table of each contender's best configuration over the final seeds."""
    rows = []
    for name in found.experiment.contenders:
        if (row := found.best(name, setup)) is None:
            rows.append([name, "is being tuned", *[NOTHING] * 6, *_paper(found, name)])
            continue
        losses = list(row.losses.values())
        edge = " (at the edge of the rates tried)" if found.at_edge(name, setup) else ""
        figures = [_figure(row.mean), _figure(statistics.deviation(losses))]
        counts = [f"{len(losses)} of {row.wanted}", *figures, str(row.spikes), str(row.diverged)]
        rows.append([name, f"{row.rate:g}{edge}", _settings(row.settings), *counts, *_paper(found, name)])
    headings = ["contender", "rate", "settings", "seeds", "mean", "std", "spikes", "diverged"]
    return table([*headings, *["the paper"] * bool(found.experiment.paper)], rows)


def _paper(found: Analysis, name: str) -> list[str]:
    """The paper's figure for a contender, where the experiment has any; under "The paper's figures" is what it is."""
    return [found.experiment.paper.get(name, NOTHING)] if found.experiment.paper else []


def best_of_rates(found: Analysis, setup: str) -> str:
    """The table of an experiment without tuning: each contender at the best of its rates that has all of its seeds."""
    rows = []
    for name in found.experiment.contenders:
        if (row := found.best(name, setup)) is None:
            continue  # under "Not run yet"
        losses = list(row.losses.values())
        edge = " (at the edge)" if found.at_edge(name, setup) else ""
        paired = found.paired(name, found.experiment.reference, setup)
        test = [NOTHING] * 3
        if name != found.experiment.reference:
            test = [_figure(paired.mean), _interval(paired), _p(paired.p)]
        figures = [_figure(row.mean), _figure(statistics.deviation(losses)), str(row.spikes), str(row.diverged)]
        rows.append([name, f"{row.rate:g}{edge}", str(row.wanted), *figures, *test, *_paper(found, name)])
    is_chosen = any(len(entry.rates) > 1 for entry in found.experiment.contenders.values())
    chosen = "Each rate is the best of few, chosen on the same seeds" if is_chosen else "Each has one rate, not tuned"
    note = (
        f"The difference is over {found.experiment.reference}'s, seed by seed: positive speaks for "
        f"{found.experiment.reference}. {chosen}, and p is of one pair, whatever the number of rows: nothing is ranked."
    )
    tests = ["difference", "95% interval", "p", *["the paper"] * bool(found.experiment.paper)]
    return f"{note}\n\n{table(['contender', 'rate', 'seeds', 'mean', 'std', 'spikes', 'diverged', *tests], rows)}"


def differences(found: Analysis, setup: str) -> str:
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
    return [
        _figure(paired.mean),
        _interval(paired),
        *map(_p, (paired.p, paired.wilcoxon, paired.beyond, ranked.adjusted)),
    ]


def _interval(paired: Paired) -> str:
    return NOTHING if math.isnan(paired.low) else f"{_figure(paired.low)} to {_figure(paired.high)}"


def by_rate(found: Analysis, setup: str) -> str:
    """The table of all configurations: loss, spikes and divergence against the rate."""
    rows = []
    for row in found.rows:
        if row.setup != setup or not row.results:
            continue
        losses = list(row.losses.values())
        kind = "tuning" if row.tuning else "final"
        figures = [_figure(row.mean), _figure(statistics.deviation(losses))]
        counts = [f"{row.spikes / len(losses):.2f}", f"{row.diverged} of {len(losses)}"]
        rows.append([row.contender, _settings(row.settings), f"{row.rate:g}", kind, *figures, *counts])
    return table(["contender", "settings", "rate", "runs", "mean", "std", "spikes a run", "diverged"], rows)


def widths(found: Analysis, setup: str) -> str:
    """The table of the rates that are as good as the best."""
    rows = []
    for name in found.experiment.contenders:
        if len(found.by_rate(name, setup)) > 1 and (w := found.width(name, setup)):
            low, high = "<= " * w.open_low + f"{w.low:g}", ">= " * w.open_high + f"{w.high:g}"
            rows.append([name, low, high, w.ratio])
    which = f"at the best settings, by {tuned_by(found)}" if found.experiment.tuning else "over the seeds there are"
    note = f"Rates tried around the best whose loss is within {statistics.WITHIN:g} of it, {which}."
    return f"{note}\n\n{table(['contender', 'lowest', 'highest', 'ratio'], rows)}"


def tuned_by(found: Analysis) -> str:
    """The runs that an experiment is tuned by."""
    assert found.experiment.tuning is not None
    seeds = found.experiment.tuning.all_seeds
    return f"the mean over {len(seeds)} tuning seeds" if len(seeds) > 1 else "the tuning seed"


def steps_ratio(found: Analysis, ratios: Iterable[Ratio]) -> str:
    """The table of how many times the reference's steps a rival needs for the reference's loss."""
    rows = []
    for r in ratios:
        each = sorted(r.by_seed, key=lambda one: (one.steps, one.bound))
        span = f"{each[0].over(r.steps)} to {each[-1].over(r.steps)}"
        rows.append([r.rival, str(r.steps), str(r.seeds), _figure(r.gap), r.mean.over(r.steps), span])
    note = (
        f"How many times {found.experiment.reference}'s steps a rival trains for {found.experiment.reference}'s final "
        "loss: its final losses at the lengths there are, each with a schedule of its own, and straight lines over the "
        "logarithm of the steps between them. By the means over the seeds, and seed by seed, the least and the most. "
        "Where the loss is not reached at the greatest length, or is below at the least, the ratio is a bound."
    )
    headings = ["rival", "steps", "seeds", "loss behind", "steps ratio", "over seeds"]
    return f"{note}\n\n{table(headings, rows)}"


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


def cells(found: Analysis) -> str:
    """The table of single runs: key, what it is, and its loss."""
    order = {name: place for place, name in enumerate(found.experiment.contenders)}
    ordered = sorted(found.results.values(), key=lambda r: (r["setup"], order[r["contender"]], r["rate"], r["seed"]))
    rows = [
        [
            *(r["key"], r["setup"], r["contender"], f"{r['rate']:g}", _settings(json.dumps(r["settings"]))),
            *(str(r["seed"]), _figure(r["final"]), str(len(r["spikes"])), _diverged(r)),
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
    return NOTHING if math.isnan(value) else f"{value:z.4f}"


def _p(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2g}"
