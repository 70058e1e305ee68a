"""Steps ratios: how long a rival trains for the reference's loss, where each length has a schedule of its own."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from s3_megatron.evidence.analysis import Analysis


@dataclass(frozen=True)
class Reached:
    """The length at which a curve of final losses meets a loss; ``bound`` is "<=" or ">=" where it lies outside."""

    steps: float
    bound: str = ""

    def over(self, steps: int) -> str:
        """Write it as a multiple of so many steps."""
        return f"{self.bound} {self.steps / steps:.2f}".strip()


@dataclass(frozen=True)
class Ratio:
    """A rival against the reference of one length, over the seeds that all their lengths have."""

    rival: str
    steps: int
    seeds: int
    gap: float  # the rival's mean loss minus the reference's, at this length
    mean: Reached  # by the means over seeds
    by_seed: list[Reached]


def lengths(found: Analysis) -> list[str]:
    """Name the first setup and those equal to it but for the steps, the shortest first; none if it is alone."""
    setups = found.experiment.setups
    first = next(iter(setups.values()))
    same = [name for name, setup in setups.items() if replace(setup, steps=first.steps) == first]
    return sorted(same, key=lambda name: setups[name].steps) if len(same) > 1 else []


def reached(curve: Mapping[int, float], loss: float) -> Reached:
    """Find where a curve, final losses by steps, first comes down to ``loss``: straight lines over log steps."""
    points = sorted(curve.items())
    if points[0][1] <= loss:
        return Reached(points[0][0], "<=")
    for (short, high), (long, low) in itertools.pairwise(points):
        if low <= loss:
            share = (high - loss) / (high - low)
            return Reached(math.exp(math.log(short) + share * math.log(long / short)))
    return Reached(points[-1][0], ">=")


def ratios(found: Analysis) -> Iterator[Ratio]:
    """Compare each rival with the reference at each length, where both have runs of all of them."""
    setups, reference = lengths(found), found.experiment.reference
    for rival in found.experiment.contenders:
        rows = [[found.best(name, setup) for setup in setups] for name in (reference, rival)]
        seeds = [s for s in found.experiment.seeds if all(row and s in row.losses for some in rows for row in some)]
        if rival == reference or not seeds or not setups:
            continue
        steps = [found.experiment.setups[setup].steps for setup in setups]
        ours, theirs = ([row.losses for row in some if row] for some in rows)
        curves = {s: dict(zip(steps, (losses[s] for losses in theirs), strict=True)) for s in seeds}
        curve = {length: fmean(curves[s][length] for s in seeds) for length in steps}
        for length, losses in zip(steps, ours, strict=True):
            mean = fmean(losses[s] for s in seeds)
            each = [reached(curves[s], losses[s]) for s in seeds]
            yield Ratio(rival, length, len(seeds), curve[length] - mean, reached(curve, mean), each)
