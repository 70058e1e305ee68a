"""The tests by which contenders are ranked: docs/evidence.md, "The rule of ranking"."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA = 0.01
# Nats. Tuning goes by single runs, so two equal optimizers get different rates by luck, and then losses.
MARGIN = 0.01
CONFIDENCE = 0.95
SAME = "no difference shown"
WITHIN = 0.05  # nats over the best, for the width of a range of rates


@dataclass(frozen=True)
class Paired:
    """What the differences of two contenders over the same seeds say; NaN where there are too few, or no spread."""

    pairs: int
    mean: float
    low: float
    high: float
    p: float  # two-sided paired t-test
    beyond: float  # the same of a difference of more than MARGIN, either way
    wilcoxon: float  # two-sided signed-rank test


def paired(rival: Sequence[float], reference: Sequence[float]) -> Paired:
    """Compare the losses of a rival with the reference's, seed by seed; positive differences speak for the reference.

    Differences that are all equal have no spread to measure by: they get p = 1 if they are 0, and NaN otherwise.
    """
    differences = np.asarray(rival, float) - np.asarray(reference, float)
    count, mean = len(differences), float(differences.mean()) if len(differences) else math.nan
    if count < 2:
        return Paired(count, mean, *[math.nan] * 5)
    if np.ptp(differences) == 0:
        p = 1.0 if mean == 0 else math.nan
        return Paired(count, mean, mean, mean, p, p, p)
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    sides = [
        stats.ttest_1samp(differences, side * MARGIN, alternative=way) for side, way in ((1, "greater"), (-1, "less"))
    ]
    beyond = min(1.0, 2 * min(float(side.pvalue) for side in sides))
    signed = float(stats.wilcoxon(differences).pvalue)
    return Paired(count, mean, float(interval.low), float(interval.high), float(test.pvalue), beyond, signed)


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down rule; a missing one (NaN) stays so, and counts as a test to come.

    Counted as the largest, it can only lower the others when it comes: a verdict is never taken back.
    """
    known = sorted((p, place) for place, p in enumerate(values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(values), 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(values) - rank) * p))
        adjusted[place] = largest
    return adjusted


def verdict(mean: float, adjusted: float) -> str:
    """Rank the reference against a rival from their mean difference and its adjusted p-value."""
    if not adjusted < ALPHA:
        return SAME
    return "better" if mean > 0 else "worse"


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample; NaN for less than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Width:
    """The rates next to the best one whose losses are within WITHIN of its, and whether the range may go on."""

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def ratio(self) -> str:
        """The highest over the lowest rate; where the range may go on, the least that it can be."""
        return ">= " * (self.open_low or self.open_high) + f"{self.high / self.low:.3g}"


def width(losses: dict[float, float]) -> Width:
    """Find the range of rates that are as good as the best, from a loss for each rate tried."""
    rates = sorted(losses)
    first = last = min(range(len(rates)), key=lambda i: losses[rates[i]])
    limit = losses[rates[first]] + WITHIN
    while first > 0 and losses[rates[first - 1]] <= limit:
        first -= 1
    while last < len(rates) - 1 and losses[rates[last + 1]] <= limit:
        last += 1
    return Width(rates[first], rates[last], first == 0, last == len(rates) - 1)
