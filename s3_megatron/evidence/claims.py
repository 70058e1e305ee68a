"""The paper's claims, and what this project's records show of each: ``python -m s3_megatron.evidence.claims``.

docs/evidence.md has the table that it prints. Of the records in benchmarks/records, an experiment's latest counts.
"""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from s3_megatron import machine
from s3_megatron.errors import S3Error
from s3_megatron.evidence import analysis, experiments, horizons
from s3_megatron.evidence.analysis import Analysis, Row
from s3_megatron.evidence.statistics import SAME, Paired
from s3_megatron.evidence.tables import table

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"
NOT_RUN = "not run yet"
NOT_TESTABLE = "not testable here"
NO_SPIKES = "not testable at these rates: no run had a spike"


@dataclass(frozen=True)
class Claim:
    """A claim, where the paper has it, the experiments that test it, the best first, and how one's analysis is read.

    ``look`` returns None where runs are missing.
    """

    text: str
    where: str
    tested_by: Sequence[str]
    look: Callable[[Analysis], str | None] = lambda found: None


def outcome(holds: bool, figures: str) -> str:
    """Write an outcome with the figures that it follows from."""
    return f"{'reproduced' if holds else 'not reproduced'}: {figures}"


def gained(pairs: Mapping[str, Paired], where: str) -> str:
    """Write an outcome that holds where every difference is above 0 by its 95% interval."""
    figures = ", ".join(f"{what} {pair.mean:+.4f} ({pair.low:.4f} to {pair.high:.4f})" for what, pair in pairs.items())
    return outcome(all(pair.low > 0 for pair in pairs.values()), f"nats gained {where} {figures}")


def whole(found: Analysis, *names: str) -> dict[str, list[Row]] | None:
    """Contenders' final rows over all setups; None where one lacks a run."""
    rows = {name: [row for setup in found.experiment.setups for row in found.final(name, setup)] for name in names}
    return rows if all(row.is_whole for some in rows.values() for row in some) else None


def lower_than_rivals(found: Analysis) -> str | None:
    """S3 is ranked better than each of the paper's four rivals."""
    (setup,) = found.experiment.setups
    verdicts = {r.contender: r.verdict for r in found.ranking(setup) if r.contender in found.experiment.paper}
    if not verdicts or any(verdict.startswith("not ranked") for verdict in verdicts.values()):
        return None
    figures = ", ".join(
        f"{verdict} than {name}" if verdict != SAME else f"{SAME} to {name}" for name, verdict in verdicts.items()
    )
    return outcome(set(verdicts.values()) == {"better"}, figures)


def half_the_steps(found: Analysis) -> str | None:
    """AdamW needs twice the steps at least, at every length at which the ratio is no open bound."""
    some = [r for r in horizons.ratios(found) if r.rival == "adamw"]
    if not some or any(r.seeds < len(found.experiment.seeds) for r in some):
        return None
    figures = ", ".join(f"{r.mean.over(r.steps)} times {r.steps} steps" for r in some)
    seen = [r.mean.steps / r.steps >= 2 for r in some if r.mean.bound != ">=" or r.mean.steps / r.steps >= 2]
    return outcome(bool(seen) and all(seen), f"AdamW needs {figures}")


def each_part_helps(found: Analysis) -> str | None:
    """Down the rows of Table 4, each is lower than the one before by a 95% interval above 0."""
    (setup,) = found.experiment.setups
    steps = ("adamw", "s3-p2-beta0.95-no-nesterov", "s3-p2-beta0.95-nesterov", found.experiment.reference)
    if whole(found, *steps) is None:
        return None
    parts = zip(("one beta", "Nesterov", "p 3"), itertools.pairwise(steps), strict=True)
    return gained({part: found.paired(before, after, setup) for part, (before, after) in parts}, "by")


def clipping_helps(found: Analysis) -> str | None:
    """AdamW with a clipped update has fewer spikes over all rates, and diverges no more often."""
    rows = whole(found, "adamw", "adamw-clipped")
    if rows is None:
        return None
    spikes, diverged = (
        {n: sum(getattr(row, what) for row in some) for n, some in rows.items()} for what in ("spikes", "diverged")
    )
    runs = {name: sum(len(row.results) for row in some) for name, some in rows.items()}
    figures = ", ".join(f"{name} {spikes[name]} spikes, {diverged[name]} of {runs[name]} diverged" for name in rows)
    if not sum(spikes.values()):
        return f"{NO_SPIKES}; {figures}" if sum(diverged.values()) else NO_SPIKES
    return outcome(
        spikes["adamw-clipped"] < spikes["adamw"] and diverged["adamw-clipped"] <= diverged["adamw"], figures
    )


def one_beta_ends_spikes(found: Analysis) -> str | None:
    """AdamW has spikes or diverges somewhere, and with one beta it does nowhere, at the same rates and setups."""
    rows = whole(found, "adamw", "adamw-999", "adamw-one-beta")
    if rows is None:
        return None
    counts = {name: sum(row.spikes + row.diverged for row in some) for name, some in rows.items()}
    if not any(counts.values()):
        return NO_SPIKES
    figures = ", ".join(f"{name} {count}" for name, count in counts.items())
    return outcome(counts["adamw-one-beta"] == 0, f"spikes and divergences: {figures}")


def stands_larger_rates(found: Analysis) -> str | None:
    """S3's range of good rates is wider than that of AdamW with either betas, in every setup."""
    names = ("s3", "adamw", "adamw-999")
    if whole(found, *names) is None:
        return None
    ratio, ranges = {}, []
    for setup, name in itertools.product(found.experiment.setups, names):
        width = found.width(name, setup)
        assert width is not None
        ratio[setup, name] = width.high / width.low
        ranges.append(f"{setup}: {name} {width.low:g} to {width.high:g} ({width.ratio})")
    holds = all(ratio[s, "s3"] > max(ratio[s, "adamw"], ratio[s, "adamw-999"]) for s in found.experiment.setups)
    return outcome(holds, f"rates within .05 nats of the best, and their ratio: {', '.join(ranges)}")


def bounded_updates(found: Analysis) -> str | None:
    """With one beta no |u| exceeds 1 (to the rounding of a weight), and with (.9, .999) AdamW's does, up to 7.27."""
    recoveries = found.recoveries()
    largest = {
        name: max((r.largest for r in recoveries if r.contender == name), default=None) for name in ("s3", "adamw")
    }
    ours, theirs = largest.values()
    if ours is None or theirs is None or found.finished < found.total:
        return None
    return outcome(
        ours <= 1.001 and 1 < theirs <= 7.28, f"largest |u| after a gradient spike: S3 {ours:.3f}, AdamW {theirs:.3f}"
    )


def a_soft_end_lowers(soft: str) -> Callable[[Analysis], str | None]:
    """At every share of hard steps, the run ends lower than with hard steps alone, by a 95% interval above 0."""

    def look(found: Analysis) -> str | None:
        shares = [n.removeprefix(f"{soft}-") for n in found.experiment.contenders if n.startswith(f"{soft}-")]
        pairs = {
            f"{share} at {setup}": found.paired(f"{soft}-1", f"{soft}-{share}", setup)
            for setup, share in itertools.product(found.experiment.setups, shares)
            if share != "1"
        }
        if any(pair.pairs < len(found.experiment.seeds) for pair in pairs.values()):
            return None
        return gained(pairs, "with a hard share of")

    return look


CLAIMS = [
    Claim(
        "S3's final loss is lower than AdamW's, NAdam's, Lion's and Adan's",
        "Table 2",
        ["table2", "table2-small", "table2-seeds", "table2-tiny"],
        lower_than_rivals,
    ),
    Claim("AdamW needs twice the steps for S3's loss", "Table 2", ["horizon"], half_the_steps),
    Claim("One beta, Nesterov and p 3 each lower the loss", "Table 4", ["table4", "table4-small"], each_part_helps),
    Claim("S3 stands larger rates than AdamW", "Figure 7, Table 4", ["rates", "rates-tiny"], stands_larger_rates),
    Claim("One beta for both averages ends AdamW's spikes", "Figure 7", ["rates"], one_beta_ends_spikes),
    Claim(
        "Clipping AdamW's update to [-1, 1] makes fewer spikes", "Figure 7", ["table4", "table4-small"], clipping_helps
    ),
    Claim(
        "|u| is at most 1 for S3, and up to 7.27 for AdamW at (.9, .999)", "Theorems 1, 2", ["spike"], bounded_updates
    ),
    Claim("A rise of mean |u| comes before every spike", "Figure 2", []),
    Claim(
        "Signum ends lower where its last steps are soft, with .3 to .9 of all steps hard",
        "arXiv 2605.31371",
        ["softsign-pairs"],
        a_soft_end_lowers("softsignum"),
    ),
    Claim(
        "Muon ends lower where its last steps are soft, with .3 to .9 of all steps hard",
        "arXiv 2605.31371",
        ["softsign-pairs"],
        a_soft_end_lowers("softmuon"),
    ),
    Claim(
        "Signum at a constant rate ends lower so, too",
        "arXiv 2605.31371",
        ["softsign-constant"],
        a_soft_end_lowers("softsignum"),
    ),
    Claim(
        "Muon at a constant rate ends lower so, too",
        "arXiv 2605.31371",
        ["softsign-constant"],
        a_soft_end_lowers("softmuon"),
    ),
    Claim("The same at 345M and 7B weights, 50,000 steps", "Tables 2, 3", []),
]


def load(records: Path) -> dict[str, tuple[str, Analysis]]:
    """Read the latest record of each experiment: its folder's name, and its analysis.

    Raises:
        S3Error: there is no such folder, or a record is damaged.
    """
    if not records.is_dir():
        raise S3Error(f"{records} is no folder: give that of the records, benchmarks/records of a checkout")
    found = {}
    for folder in sorted(records.glob("????-??-??-*")):
        name = folder.name[11:]
        asked = experiments.load(str(folder / f"{name}.yaml"))
        found[name] = folder.name, analysis.read(folder / "cells.jsonl", asked)[1]
    return found


def rows(found: Mapping[str, tuple[str, Analysis]]) -> list[list[str]]:
    """A row a claim: what it says, where, what was seen, and the record."""
    lines = []
    for claim in CLAIMS:
        seen, record = NOT_RUN if claim.tested_by else NOT_TESTABLE, ""
        for name in claim.tested_by:
            if name in found and (result := claim.look(found[name][1])):
                seen, record = result, found[name][0]
                break
        lines.append([claim.text, claim.where, seen, record or " or ".join(claim.tested_by) or "-"])
    return lines


def page(records: Path = RECORDS) -> str:
    """The table of docs/evidence.md."""
    return table(["the paper's claim", "there", "here", "record or experiment"], rows(load(records)))


def main() -> None:
    """Print the table; ends with 2 and one line on a mistake."""
    machine.use_utf8()
    try:
        print(page(*map(Path, sys.argv[1:2])))
    except S3Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
