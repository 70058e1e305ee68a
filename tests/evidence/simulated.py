"""Experiments whose runs are drawn, not trained: what plan and report do with losses is tested on losses."""

import hashlib
import json
import math
from collections.abc import Callable

from s3_megatron.evidence.cells import Cell, Result
from s3_megatron.evidence.experiments import Entry, Experiment, Setup, Tuning
from s3_megatron.evidence.plan import Plan
from s3_megatron.evidence.training import describe

RATES = [1e-3, 2e-3, 4e-3, 8e-3]
TEXT = "0" * 64


def experiment(names=("s3", "adamw", "nadam", "lion"), **changes) -> Experiment:
    """Contenders of one grid; the first is the reference."""
    given = {
        "name": "simulated",
        "title": "Simulated",
        "reference": names[0],
        "text": "none",
        "setups": {"base": Setup(steps=100)},
        "seeds": list(range(1, 9)),
        "contenders": {name: Entry("s3", RATES, {"beta": 0.95}, {"beta": [0.9]}) for name in names},
        "tuning": Tuning(seed=0, runs=8),
    }
    return Experiment(**{**given, **changes})


def result(cell: Cell, loss: float | None, **changes) -> Result:
    """A finished cell as train() and a worker describe it."""
    return {
        **describe(cell),
        **dict.fromkeys(("weights", "order"), str(cell.seed)),
        "validation": loss,
        "seconds": 36.0,
        "spikes": [],
        "diverged": None,
        "commit": "abc",
        "card": "a card",
        "versions": "torch 0",
        **changes,
    }


def losses(noise: float, shifts: dict[str, float] | None = None, grid: int = 0) -> Callable[[Cell], float]:
    """A parabola over the logarithm of the rate, a part that a seed has for all contenders, and noise of each run."""

    def loss(cell: Cell) -> float:
        drawn = _normal(f"{grid} {cell.key}")
        return (
            1.5
            + 0.05 * math.log2(cell.rate / 4e-3) ** 2
            + 0.1 * _normal(f"{grid} {cell.seed}")
            + noise * drawn
            + (shifts or {}).get(cell.contender, 0.0)
        )

    return loss


def run(asked: Experiment, loss: Callable[[Cell], float], cells: int | None = None) -> list[Result]:
    """Run the plan to its end, or so many cells of it."""
    plan, finished = Plan(asked, TEXT), {}
    while ready := plan.ready(finished):
        for cell in ready:
            if cells is not None and len(finished) == cells:
                return list(finished.values())
            finished[cell.key] = result(cell, loss(cell))
    return list(finished.values())


def write(path, asked: Experiment, results: list[Result]) -> None:
    """Write a cells file."""
    head = {"experiment": asked.name, "rules": asked.sha256[:16], "text": TEXT[:16], "code": "c", "commit": "abc"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *results]))


def _normal(text: str) -> float:
    """A normal number that follows from a text, by Box and Muller."""
    digest = hashlib.sha256(text.encode()).digest()
    first, second = ((int.from_bytes(digest[i : i + 6]) + 0.5) / 2**48 for i in (0, 6))
    return math.sqrt(-2 * math.log(first)) * math.cos(2 * math.pi * second)
