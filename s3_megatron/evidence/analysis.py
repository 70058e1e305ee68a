"""What an experiment's finished cells show, as figures; report.py writes them, pictures.py draws them."""

import itertools
import lzma
import math
import statistics as plain
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.evidence import statistics
from s3_megatron.evidence.cells import Cell, Result, check_head, read_lines
from s3_megatron.evidence.experiments import Experiment
from s3_megatron.evidence.plan import Configuration, Plan, dumps, loss_of
from s3_megatron.evidence.statistics import Paired, Width

FAR = 0.3  # nats
RECOVERED_LOSS, RECOVERED_UPDATE, RECOVERED_STEPS = 0.02, 0.10, 16


@dataclass(frozen=True)
class Row:
    """A contender's runs with one rate and settings; ``tuning`` ones have the tuning seeds."""

    contender: str
    setup: str
    rate: float
    settings: str  # JSON
    tuning: bool
    wanted: int
    results: list[Result]

    @property
    def losses(self) -> dict[int, float]:
        """The final validation loss of each seed, as it is ranked."""
        return {result["seed"]: result["final"] for result in self.results}

    @property
    def spikes(self) -> int:
        """All runs' spikes."""
        return sum(len(result["spikes"]) for result in self.results)

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(result["diverged"] is not None for result in self.results)

    @property
    def mean(self) -> float:
        """The mean final loss of the seeds there are; NaN where there is none."""
        return plain.fmean(self.losses.values()) if self.results else math.nan

    @property
    def is_whole(self) -> bool:
        """Whether every seed has been run."""
        return len(self.results) == self.wanted


@dataclass(frozen=True)
class Ranked:
    """A rival at its best configuration against the reference at its own."""

    contender: str
    setup: str
    paired: Paired
    wanted: int
    adjusted: float  # paired.beyond by Holm over the rivals of the setup; NaN until all pairs are there

    @property
    def verdict(self) -> str:
        """The reference's rank against this rival."""
        if self.paired.pairs < self.wanted:
            return f"not ranked: {self.paired.pairs} of {self.wanted} seeds"
        return statistics.verdict(self.paired.mean, self.adjusted)


@dataclass(frozen=True)
class Recovery:
    """One run with a kicked step against the same run without: steps until it has recovered, None if it has not."""

    contender: str
    kick: float
    seed: int
    loss: int | None
    update: int | None
    largest: float  # max |u| from the kicked step on


class Analysis:
    """An experiment's cells, looked at by its plan."""

    def __init__(self, experiment: Experiment, results: Iterable[Result]) -> None:
        """``results`` are the lines of a cells file behind its first.

        Raises:
            S3Error: two contenders did not see the same data or initial weights with a seed.
        """
        self.experiment, self.plan = experiment, Plan(experiment, "")
        worst = math.log(experiment.vocabulary) + 1
        self.results: dict[str, Result] = {}  # each with its "final" validation loss, as it is ranked
        for result in results:
            if result["contender"] in experiment.contenders and result["setup"] in experiment.setups:
                loss = result["validation"]
                final = loss if loss is not None and math.isfinite(loss) else worst
                # The text's hash is the file's, and left out of the key.
                self.results[self._cell(result).key] = {**result, "final": final}
        self._refuse_unequal_starts()
        self.rows = list(self._rows())
        self.total = sum(self.plan.total().values())

    def _cell(self, result: Result) -> Cell:
        configuration = result["rate"], dumps(result["settings"])
        return self.plan.cell(result["contender"], result["setup"], configuration, result["seed"])

    def _refuse_unequal_starts(self) -> None:
        seen: dict[tuple[str, int], Result] = {}
        for result in self.results.values():
            first = seen.setdefault((result["setup"], result["seed"]), result)
            for what in ("weights", "order"):
                if result[what] != first[what]:
                    raise S3Error(
                        f"cells {first['key']} and {result['key']} have seed {result['seed']} and another hash of "
                        f"{what} ({first[what]} and {result[what]}): they compare nothing; remove one, and run it again"
                    )

    def _rows(self) -> Iterator[Row]:
        for name, setup in self.plan.pairs():
            if self.experiment.tuning:
                seeds = self.experiment.tuning.all_seeds
                tried: dict[Configuration, list[Result]] = {}
                for result in [r for r in self._of(name, setup) if r["seed"] in seeds]:
                    tried.setdefault((result["rate"], dumps(result["settings"])), []).append(result)
                for (rate, settings), found in sorted(tried.items(), key=lambda item: item[0][::-1]):
                    yield Row(name, setup, rate, settings, True, len(seeds), found)
            for (rate, settings), cells in (self.plan.final(name, setup, self.results) or {}).items():
                found = [self.results[cell.key] for cell in cells if cell.key in self.results]
                yield Row(name, setup, rate, settings, False, len(cells), found)

    def _of(self, name: str, setup: str) -> list[Result]:
        return [r for r in self.results.values() if (r["contender"], r["setup"]) == (name, setup)]

    @property
    def finished(self) -> int:
        """How many of the plan's cells there are."""
        return sum(len(row.results) for row in self.rows)

    def final(self, name: str, setup: str) -> list[Row]:
        """A contender's rows outside of tuning, with tuning its best configuration first; none while it is tuned."""
        return [row for row in self.rows if (row.contender, row.setup, row.tuning) == (name, setup, False)]

    def at_edge(self, name: str, setup: str) -> bool:
        """Whether a contender's best rate is at the edge of those tried."""
        if self.experiment.tuning:
            return self.plan.tuned(name, setup, self.results).at_edge
        rates = sorted(row.rate for row in self.final(name, setup))
        best = self.best(name, setup)
        return best is not None and len(rates) > 1 and best.rate in (rates[0], rates[-1])

    def ranking(self, setup: str) -> list[Ranked]:
        """Compare every rival with the reference, at best configurations; empty without tuning."""
        if self.experiment.tuning is None:
            return []
        reference, seeds = self.experiment.reference, len(self.experiment.seeds)
        rivals = [name for name in self.experiment.contenders if name != reference]
        ranked = [Ranked(name, setup, self.paired(name, reference, setup), seeds, math.nan) for name in rivals]
        whole = [r.paired.beyond if r.paired.pairs == r.wanted else math.nan for r in ranked]
        return [replace(r, adjusted=p) for r, p in zip(ranked, statistics.holm(whole), strict=True)]

    def best(self, name: str, setup: str) -> Row | None:
        """A contender's final row with its best configuration; without tuning, the best of those that are whole."""
        rows = self.final(name, setup)
        if self.experiment.tuning:
            return next(iter(rows), None)
        return min((row for row in rows if row.is_whole), key=lambda row: row.mean, default=None)

    def paired(self, name: str, other: str, setup: str) -> Paired:
        """Compare two contenders' best rows over the seeds that both have; positive differences speak for ``other``."""
        rows = self.best(name, setup), self.best(other, setup)
        left, right = (row.losses if row else {} for row in rows)
        seeds = [seed for seed in self.experiment.seeds if seed in left and seed in right]
        return statistics.paired([left[seed] for seed in seeds], [right[seed] for seed in seeds])

    def far_behind(self, setup: str) -> dict[str, float]:
        """Contenders whose lowest mean loss is more than FAR over the median of the others', and by how much.

        Once there are final runs, these count: a tuning seed may stand what most seeds do not. None in a setup with a
        kick: to be thrown far is what it measures.
        """
        lowest: dict[str, float] = {}
        for name in self.experiment.contenders if self.experiment.setups[setup].kick == 1 else ():
            rows = [row for row in self.rows if (row.contender, row.setup) == (name, setup) and row.results]
            final = [row for row in rows if not row.tuning]
            if rows:
                lowest[name] = min(row.mean for row in final or rows)
        gaps = {
            name: loss - plain.median(theirs for other, theirs in lowest.items() if other != name)
            for name, loss in lowest.items()
            if len(lowest) > 1
        }
        return {name: gap for name, gap in gaps.items() if gap > FAR}

    def by_rate(self, name: str, setup: str) -> dict[float, list[Result]]:
        """A contender's runs at each rate: with tuning, those with the tuning seeds at the best settings."""
        rows = [r for r in self.rows if (r.contender, r.setup) == (name, setup) and r.results]
        if self.experiment.tuning:
            rows = [row for row in rows if row.tuning]
            if not rows:
                return {}
            best = self.plan.tuned(name, setup, self.results).best
            settings = best[1] if best else min(rows, key=lambda row: plain.fmean(map(loss_of, row.results))).settings
            rows = [row for row in rows if row.settings == settings]
        return {row.rate: row.results for row in sorted(rows, key=lambda row: row.rate)}

    def width(self, name: str, setup: str) -> Width | None:
        """The range of rates that are as good as a contender's best, over by_rate's runs; None without any."""
        losses = {rate: plain.fmean(r["final"] for r in some) for rate, some in self.by_rate(name, setup).items()}
        return statistics.width(losses) if losses else None

    def recoveries(self) -> list[Recovery]:
        """Compare each kicked run that is finished with its twin that was not."""
        setups, found = self.experiment.setups, []
        calm = [name for name, setup in setups.items() if setup.kick_step >= 0 and setup.kick == 1]
        for (name, setup), twin in itertools.product(self.plan.pairs(), calm):
            if replace(setups[setup], kick=1.0) != setups[twin] or setup == twin:
                continue
            twins = {(r["rate"], r["seed"]): r for row in self.final(name, twin) for r in row.results}
            for kicked in [r for row in self.final(name, setup) for r in row.results]:
                if (kicked["rate"], kicked["seed"]) in twins:
                    other = twins[kicked["rate"], kicked["seed"]]
                    found.append(recovery(kicked, other, setups[setup].kick, setups[setup].kick_step))
        return found


def recovery(kicked: Result, twin: Result, kick: float, step: int) -> Recovery:
    """Count the steps after the kick until a run is as its twin again, by the definition in docs/evidence.md."""
    gaps = [_gap(a, b) for a, b in zip(kicked["losses"][step + 1 :], twin["losses"][step + 1 :], strict=True)]
    loss = next((i for i, some in enumerate(_windows(gaps)) if plain.fmean(some) < RECOVERED_LOSS), None)
    moves = zip(kicked["update_mean"][step + 1 :], twin["update_mean"][step + 1 :], strict=True)
    alike = [a is not None and b is not None and abs(a - b) <= RECOVERED_UPDATE * b for a, b in moves]
    update = next((i for i, some in enumerate(_windows(alike)) if all(some)), None)
    largest = max((u for u in kicked["update_max"][step:] if u is not None), default=math.nan)
    return Recovery(kicked["contender"], kick, kicked["seed"], loss, update, largest)


def _gap(kicked: float | None, twin: float | None) -> float:
    return math.inf if kicked is None or twin is None else kicked - twin


def _windows[T](values: list[T]) -> Iterator[list[T]]:
    for i in range(len(values) - RECOVERED_STEPS + 1):
        yield values[i : i + RECOVERED_STEPS]


def read(path: Path, experiment: Experiment) -> tuple[Mapping[str, str], Analysis]:
    """Read a cells file, or the compressed one that a record has in its place: its first line, and the rest.

    A line that is being written, or was cut short, is passed over.

    Raises:
        S3Error: there is none, it is damaged, or another experiment's.
    """
    packed = path.with_name(f"{path.name}.xz")
    is_record = packed.exists()
    try:
        data = lzma.decompress(packed.read_bytes()) if is_record else path.read_bytes()
    except (OSError, lzma.LZMAError, EOFError) as error:
        path, remedy = (
            (packed, "take it from the history again") if is_record else (path, "s3-megatron compare writes it")
        )
        raise S3Error(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; {remedy}") from None
    head, *results = read_lines(path, data[: data.rfind(b"\n") + 1]) or [{}]
    check_head(path, head, {"experiment": experiment.name, "rules": experiment.sha256[:16]}, "name its experiment")
    return head, Analysis(experiment, results)
