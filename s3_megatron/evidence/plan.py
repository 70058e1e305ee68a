"""Which cells to run next: tuning, then the final seeds. Follows from the experiment and the finished cells alone."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from s3_megatron.evidence.cells import Cell, Result
from s3_megatron.evidence.experiments import Entry, Experiment, Tuning

type Configuration = tuple[float, str]  # a rate, and settings as JSON


@dataclass
class Tuned:
    """A contender's tuning as far as it came: runs wanted now, or, once there are none, the best configuration."""

    wanted: list[Configuration] = field(default_factory=list)
    best: Configuration | None = None
    at_edge: bool = False  # the best rate is the lowest or highest that was tried


class _Missing(Exception):
    """A sweep has runs that are not finished."""


class _Search:
    """The rule of tuning in docs/evidence.md, replayed over the losses that there are."""

    def __init__(self, entry: Entry, tuning: Tuning, factor: float, losses: Mapping[Configuration, float]) -> None:
        self.entry, self.budget, self.factor, self.losses = entry, tuning.configurations, factor, losses
        self.is_wide = tuning.wide
        self.tried: list[Configuration] = []
        self.wanted: list[Configuration] = []

    @property
    def best(self) -> Configuration:
        return min(self.tried, key=lambda tried: self.losses[tried])

    def run(self) -> None:
        self.sweep([(rate, dumps(self.entry.settings)) for rate in self.entry.rates])
        while self.left and (beyond := self.beyond()) is not None:
            self.sweep([(beyond, self.best[1])])
        if self.is_wide:
            self.finish_wide()
        else:
            self.finish()

    def finish(self) -> None:
        """Steps 2 and 3, one after the other."""
        for name, values in self.entry.sweep.items():
            rate, settings = self.best
            self.sweep([(rate, dumps({**json.loads(settings), name: value})) for value in values])
        for exponent in itertools.chain((1, 1 / 2), (2.0**-i for i in range(2, 12))):
            if not self.left:
                return
            rate, settings = self.best
            self.sweep([(round_rate(rate * self.factor**power), settings) for power in (exponent, -exponent)])

    def finish_wide(self) -> None:
        """Steps 2 and 3 in three rounds: every value alone, the best ones together, and rates around the best run."""
        rate, settings = default = self.best
        changed = {
            name: [(rate, dumps({**json.loads(settings), name: value})) for value in values]
            for name, values in self.entry.sweep.items()
        }
        self.sweep([configuration for some in changed.values() for configuration in some])
        together = json.loads(settings)
        for name, some in changed.items():
            tried = [default, *(configuration for configuration in some if configuration in self.tried)]
            best = min(tried, key=self.losses.__getitem__)  # of equals the default
            if best != default:
                together[name] = json.loads(best[1])[name]
        self.sweep([(rate, dumps(together))])
        rate, settings = self.best
        powers = [odd / 2**level for level in range(8) for odd in range(1, 2**level + 1, 2)]
        self.sweep([(round_rate(rate * self.factor**power), settings) for p in powers for power in (p, -p)])

    @property
    def left(self) -> int:
        return self.budget - len(self.tried)

    def beyond(self) -> float | None:
        """The next rate outwards, if the best lies at an edge of those tried at its settings."""
        rate, settings = self.best
        rates = [tried for tried, its in self.tried if its == settings]
        if rate == max(rates):
            return round_rate(rate * self.factor)
        return round_rate(rate / self.factor) if rate == min(rates) else None

    def sweep(self, configurations: list[Configuration]) -> None:
        """Add configurations to those tried, as many as the budget has; all must be finished before the next sweep."""
        new = [c for c in dict.fromkeys(configurations) if c not in self.tried][: self.left]
        self.wanted = [c for c in new if c not in self.losses]
        if self.wanted:
            raise _Missing
        self.tried += new


def tune(entry: Entry, tuning: Tuning, factor: float, losses: Mapping[Configuration, float]) -> Tuned:
    """Say what tuning has to run next, given what it has run, and the mean of each one's final losses over the seeds.

    The loss of a run that diverged is inf.
    """
    search = _Search(entry, tuning, factor, losses)
    try:
        search.run()
    except _Missing:
        return Tuned(search.wanted)
    rate, settings = search.best
    rates = [tried for tried, its in search.tried if its == settings]
    return Tuned(best=search.best, at_edge=len(rates) > 1 and rate in (min(rates), max(rates)))


def round_rate(rate: float) -> float:
    """Round a rate to four digits, so that one is equal to itself however it was come by."""
    return float(f"{rate:.4g}")


class Plan:
    """An experiment's cells over one text."""

    def __init__(self, experiment: Experiment, text: str) -> None:
        """``text`` is the text's SHA-256."""
        self.experiment, self.text = experiment, text

    def cell(self, name: str, setup: str, configuration: Configuration, seed: int) -> Cell:
        """Make a contender's cell."""
        rate, settings = configuration
        optimizer = self.experiment.contenders[name].optimizer
        return Cell(name, optimizer, setup, self.experiment.setups[setup], rate, settings, seed, self.text)

    def tuned(self, name: str, setup: str, results: Mapping[str, Result]) -> Tuned:
        """Replay a contender's tuning over the finished cells."""
        tuning = self.experiment.tuning
        assert tuning is not None
        losses: dict[Configuration, float] = {}
        while True:
            found = tune(self.experiment.contenders[name], tuning, self.experiment.factor, losses)
            known = {c: [self.cell(name, setup, c, seed).key for seed in tuning.all_seeds] for c in found.wanted}
            finished = {
                c: fmean(loss_of(results[key]) for key in keys)
                for c, keys in known.items()
                if all(key in results for key in keys)
            }
            if not finished:
                return found
            losses |= finished

    def final(self, name: str, setup: str, results: Mapping[str, Result]) -> dict[Configuration, list[Cell]] | None:
        """List a contender's cells outside of tuning, by configuration, the best first; None while it is tuned.

        Without tuning: all rates, in the file's order.
        """
        experiment, entry = self.experiment, self.experiment.contenders[name]
        if experiment.tuning is None:
            settings = dumps(entry.settings)
            configurations = {(rate, settings): experiment.seeds for rate in entry.rates}
        else:
            best = self.tuned(name, setup, results).best
            if best is None:
                return None
            configurations = {best: experiment.seeds}
            for power in (1, -1) if experiment.neighbours else ():
                beside = round_rate(best[0] * experiment.factor**power)
                configurations[beside, best[1]] = experiment.seeds[: experiment.neighbours]
        return {c: [self.cell(name, setup, c, seed) for seed in seeds] for c, seeds in configurations.items()}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Name contenders and setups in the order in which they are run."""
        return itertools.product(self.experiment.contenders, self.experiment.setups)

    def ready(self, results: Mapping[str, Result]) -> list[Cell]:
        """List the cells that can be run now and are not finished, the most valuable first."""
        cells: list[Cell] = []
        for name, setup in self.pairs():
            final = self.final(name, setup, results)
            if final is None:
                seeds = self.experiment.tuning.all_seeds  # type: ignore[union-attr]
                wanted = self.tuned(name, setup, results).wanted
                cells += [self.cell(name, setup, c, seed) for c in wanted for seed in seeds]
            else:
                cells += [cell for some in final.values() for cell in some]
        return [cell for cell in cells if cell.key not in results]

    def runs(self, name: str) -> int:
        """Count a contender's cells in each setup, finished or not."""
        experiment = self.experiment
        if experiment.tuning is None:
            return len(experiment.contenders[name].rates) * len(experiment.seeds)
        return experiment.tuning.runs + len(experiment.seeds) + 2 * experiment.neighbours

    def total(self) -> dict[str, int]:
        """Count the cells of each setup, finished or not."""
        each = sum(map(self.runs, self.experiment.contenders))
        return dict.fromkeys(self.experiment.setups, each)


def loss_of(result: Result) -> float:
    """Return the loss that tuning goes by."""
    loss = result["validation"]
    return math.inf if loss is None or result["diverged"] is not None else loss


def dumps(settings: dict[str, Any]) -> str:
    """Write settings as cells have them."""
    return json.dumps(settings, sort_keys=True)
