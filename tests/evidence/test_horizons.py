"""Steps ratios: how many steps a rival needs for a loss that the reference reaches."""

import math
from dataclasses import replace

from s3_megatron.evidence import analysis, horizons, report
from s3_megatron.evidence.experiments import Setup
from tests.evidence import simulated
from tests.evidence.comparison import tables


def test_steps_ratios_follow_from_the_cells():
    """Lengths of 100, 200 and 400 steps; a loss of 2 - .2 log2(steps / 100) for S3, and the same .1 higher for AdamW.

    .1 nats are half an octave: AdamW needs 1.41 times the steps. At 400 it does not get there. Lion, .19 lower,
    is there at the first length, and then needs half of S3's steps and a little.
    """
    setups = {f"x{steps}": Setup(steps=steps) for steps in (200, 100, 400)}
    asked = simulated.experiment(names=("s3", "adamw", "lion"), setups=setups, seeds=[1, 2])
    shifts = {"s3": 0.0, "adamw": 0.1, "lion": -0.19}

    def loss(cell):
        by_seed = 0.02 * (cell.seed - 1) * (cell.contender == "adamw")
        return (
            2
            - 0.2 * math.log2(cell.setup.steps / 100)
            + shifts[cell.contender]
            + by_seed
            + abs(math.log2(cell.rate / 4e-3))
        )

    found = analysis.Analysis(asked, simulated.run(asked, loss))
    rows = tables(report.render({}, found))["Steps ratio"]
    adamw = [row for row in rows if row["rival"] == "adamw"]
    assert [row["steps"] for row in adamw] == ["100", "200", "400"] and {row["seeds"] for row in adamw} == {"2"}
    ratio, first, second = (2 ** ((0.1 + more) / 0.2) for more in (0.01, 0.0, 0.02))
    assert adamw[0] == {
        "rival": "adamw", "steps": "100", "seeds": "2", "loss behind": "0.1100",
        "steps ratio": f"{ratio:.2f}", "over seeds": f"{first:.2f} to {second:.2f}",
    }  # fmt: skip
    assert (adamw[1]["steps ratio"], adamw[2]["steps ratio"]) == (f"{ratio:.2f}", ">= 1.00")
    lion = [row for row in rows if row["rival"] == "lion"]
    assert [row["steps ratio"] for row in lion] == ["<= 1.00", "0.52", "0.52"]
    part = analysis.Analysis(asked, simulated.run(asked, loss, 20))
    assert "Steps ratio" not in tables(report.render({}, part))


def test_lengths_are_setups_that_differ_in_nothing_else():
    """Steps that another model saves are no steps ratio."""
    base = Setup(steps=100)
    setups = {"x100": base, "x200": replace(base, steps=200), "x200-qk": replace(base, steps=200, qk_norm=True)}
    found = analysis.Analysis(simulated.experiment(setups=setups), [])
    assert horizons.lengths(found) == ["x100", "x200"]


def test_one_length_has_no_steps_ratio():
    found = analysis.Analysis(asked := simulated.experiment(), simulated.run(asked, simulated.losses(0.01)))
    assert list(horizons.ratios(found)) == [] and "Steps ratio" not in report.render({}, found)
