"""The paper's claims: what records make of each, and that docs/evidence.md has the table as it is printed."""

import lzma
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from s3_megatron.errors import S3Error
from s3_megatron.evidence import claims, reading
from s3_megatron.evidence.analysis import Analysis
from s3_megatron.evidence.experiments import load
from s3_megatron.evidence.statistics import Paired
from tests.evidence import simulated

PAGE = Path(__file__).parents[2] / "docs/evidence.md"


def analysis(name: str, loss, cells=None, **changes) -> Analysis:
    """An experiment of configs/, whose runs are drawn."""
    asked = load(name)
    return Analysis(asked, [{**result, **changes} for result in simulated.run(asked, loss, cells)])


def seen(name: str, found: Analysis) -> dict[str, str]:
    """What is seen of each claim that the experiment tests."""
    rows = {row[0]: row for row in claims.rows({name: ("2026-01-01-x", found)})}
    return {
        claim.where + ": " + claim.text.split()[0]: rows[claim.text][2]
        for claim in claims.CLAIMS
        if name in claim.tested_by
    }


def test_the_page_of_rules_has_the_table_that_the_command_prints():
    """A record that is added makes this fail until the page says what it shows."""
    assert claims.page() in PAGE.read_text(), (
        "run python -m s3_megatron.evidence.claims, and put its table into docs/evidence.md"
    )


def test_without_records_nothing_is_claimed(tmp_path):
    rows = claims.rows(claims.load(tmp_path))
    assert {row[2] for row in rows} == {"not run yet", "not testable here"}
    assert len(rows) == len(claims.CLAIMS) >= 9
    for claim in claims.CLAIMS:
        for name in claim.tested_by:
            load(name)


@pytest.mark.parametrize(
    "shift, begins, says",
    [
        (-0.1, "reproduced", "better than lion"),
        (0.0, "not reproduced", "no difference shown to"),
        (0.1, "not reproduced", "worse than adamw"),
    ],
)
def test_lower_than_its_rivals(shift, begins, says):
    (text,) = seen("table2-small", analysis("table2-small", simulated.losses(0.003, {"s3": shift}))).values()
    assert text.startswith(begins + ": ") and says in text
    assert "one-beta" not in text, "the paper has no such rival"
    (text,) = seen("table2-small", analysis("table2-small", simulated.losses(0.003), 50)).values()
    assert text == "not run yet"


@pytest.mark.parametrize("gain, begins", [(0.0501, "reproduced"), (0.5, "reproduced"), (0.01, "not reproduced")])
def test_half_the_steps(gain, begins):
    """A loss that falls by .05 with each doubling: what is .05 lower saves half of the steps."""

    def loss(cell):
        return (
            2 - 0.05 * math.log2(cell.setup.steps) - gain * (cell.contender == "s3") + abs(math.log2(cell.rate / 8e-3))
        )

    (text,) = seen("horizon", analysis("horizon", loss)).values()
    assert text.startswith(f"{begins}: AdamW needs ")
    asked = load("horizon")
    cells = simulated.run(asked, loss)
    lacking = [c for c in cells if (c["contender"], c["setup"], c["seed"]) != ("adamw", "x8000", asked.seeds[-1])]
    for some in (cells[:100], lacking):
        assert seen("horizon", Analysis(asked, some))["Table 2: AdamW"] == "not run yet"


@pytest.mark.parametrize("flat", ["", "no-nesterov", "p3"])
def test_each_part_helps(flat):
    """Each row .05 lower than the one before it; or Nesterov, or p 3, does nothing."""
    ours = {
        "adamw": 0.15,
        "s3-p2-beta0.95-no-nesterov": 0.1,
        "s3-p2-beta0.95-nesterov": 0.05,
        "s3-p3-beta0.95-nesterov": 0.0,
    }
    lowered = {"no-nesterov": {"s3-p2-beta0.95-no-nesterov": 0.05}, "p3": {"s3-p2-beta0.95-nesterov": 0.0}}
    losses = simulated.losses(0.001, {**ours, **lowered.get(flat, {})})
    text = seen("table4-small", analysis("table4-small", losses))["Table 4: One"]
    assert text.startswith("not reproduced: " if flat else "reproduced: ")
    gain = {"": r"\+0\.0[45]", "p3": r"\+0\.(09|10)", "no-nesterov": r"[+-]0\.00"}[flat]
    assert re.search(rf"Nesterov {gain}", text), text
    assert seen("table4-small", analysis("table4-small", losses, 100))["Table 4: One"] == "not run yet"


@pytest.mark.parametrize("low, begins", [(0.0001, "reproduced: "), (-0.0001, "not reproduced: ")])
def test_a_gain_is_one_by_its_interval(low, begins):
    """A mean above 0 alone is what half of all pairs of equal optimizers have."""
    pair = Paired(5, 0.001, low, 0.003, *[0.5] * 3)
    assert claims.gained({"p 3": pair}, "by").startswith(begins)


@pytest.mark.parametrize(
    "clipped, plain, begins", [(0, 2, "reproduced"), (2, 2, "not reproduced"), (0, 0, "not testable")]
)
def test_clipping_helps(clipped, plain, begins):
    found = analysis("table4-small", simulated.losses(0.001))
    assert seen("table4-small", found)["Figure 7: Clipping"] == "not testable at these rates: no run had a spike"
    for result in found.results.values():
        result["spikes"] = [[5, 1, 1.0]] * {"adamw": plain, "adamw-clipped": clipped}.get(result["contender"], 0)
    text = seen("table4-small", found)["Figure 7: Clipping"]
    assert text.startswith(begins) and (not plain or f"adamw {15 * plain} spikes, 0 of 15 diverged" in text)


def test_a_claim_of_spikes_is_not_tested_without_one():
    """0 spikes of both, and 2 and 3 runs that diverged of 15: table4-small's claim read "not reproduced"."""
    found = analysis("table4-small", simulated.losses(0.001))
    for name, count in (("adamw", 2), ("adamw-clipped", 3)):
        for result in [r for r in found.results.values() if r["contender"] == name][:count]:
            result["diverged"] = 30
    assert seen("table4-small", found)["Figure 7: Clipping"] == (
        "not testable at these rates: no run had a spike; "
        "adamw 0 spikes, 2 of 15 diverged, adamw-clipped 0 spikes, 3 of 15 diverged"
    )
    next(r for r in found.results.values() if r["contender"] == "adamw")["spikes"] = [[5, 1, 1.0]]
    text = seen("table4-small", found)["Figure 7: Clipping"]
    assert text.startswith("not reproduced: adamw 1 spikes"), "fewer spikes, for more runs that diverged"


def test_spikes_and_rates():
    asked = load("rates")

    def loss(cell):  # S3's parabola is flatter
        middle = asked.contenders[cell.contender].rates[2]
        return 2 + (0.004 if cell.contender == "s3" else 0.05) * math.log2(cell.rate / middle) ** 2

    found = analysis("rates", loss)
    text = seen("rates", found)
    larger = text["Figure 7, Table 4: S3"]
    assert larger.startswith(
        "reproduced: rates within .05 nats of the best, and their ratio: base: s3 0.0008 to 0.08 (>= 100), "
    )
    assert text["Figure 7: One"].startswith("not testable at these rates"), "nothing to end"
    flat = analysis("rates", lambda cell: loss(cell) if cell.contender != "adamw" else 2.0)
    assert seen("rates", flat)["Figure 7, Table 4: S3"].startswith("not reproduced"), "wider than one of the two"
    for result in found.results.values():
        if result["contender"] == "adamw" and result["rate"] > 1e-2:
            result["spikes"] = [[5, 1, 1.0]]
    assert (
        seen("rates", found)["Figure 7: One"]
        == "reproduced: spikes and divergences: adamw 36, adamw-999 0, adamw-one-beta 0"
    )
    assert set(seen("rates", analysis("rates", loss, 200)).values()) == {"not run yet"}


@pytest.mark.parametrize(
    "ours, theirs, begins", [(1.0, 7.1, "reproduced"), (1.2, 7.1, "not"), (0.9, 0.9, "not"), (0.9, 7.4, "not")]
)
def test_bounded_updates(ours, theirs, begins):
    largest = {"s3": ours, "adamw": theirs}
    results = []
    for cell_result in simulated.run(load("spike"), simulated.losses(0.01)):
        update = largest.get(cell_result["contender"], 1.0)
        results.append(
            {**cell_result, "losses": [2.0] * 1200, "update_mean": [0.2] * 1200, "update_max": [update] * 1200}
        )
    (text,) = seen("spike", Analysis(load("spike"), results)).values()
    assert text.startswith(begins)
    (text,) = seen("spike", Analysis(load("spike"), results[:40])).values()
    assert text == "not run yet"


@pytest.mark.parametrize("rate", ["cosine", "constant"])
def test_a_soft_end_lowers(rate):
    """One share that gains nothing is enough for "not reproduced"; of the pairs the other reproduces."""
    name = {"cosine": "softsign-pairs", "constant": "softsign-constant"}[rate]
    shifts = {"softsignum-0.3": -0.05, "softsignum-0.9": -0.05, "softmuon-0.3": -0.05}
    found = analysis(name, simulated.losses(0.001, shifts))
    text = seen(name, found)
    signum, muon = text["arXiv 2605.31371: Signum"], text["arXiv 2605.31371: Muon"]
    assert signum.startswith(f"reproduced: nats gained with a hard share of 0.3 at {rate} +0.0")
    assert signum.count(f"at {rate}") == 2
    assert muon.startswith("not reproduced: ") and f"0.9 at {rate} " in muon
    begun = analysis(name, simulated.losses(0.001, shifts), 12)
    assert set(seen(name, begun).values()) == {"not run yet"}


class TestRecords:
    """The latest record of an experiment counts, by its own file."""

    def put(self, folder: Path, date: str, shift: float) -> None:
        asked = load("table2-small")
        target = folder / f"{date}-table2-small"
        target.mkdir(parents=True)
        shutil.copyfile(reading.source("table2-small"), target / "table2-small.yaml")
        simulated.write(target / "cells.jsonl", asked, simulated.run(asked, simulated.losses(0.003, {"s3": shift})))
        (target / "cells.jsonl.xz").write_bytes(lzma.compress((target / "cells.jsonl").read_bytes()))

    def test_the_latest_counts(self, tmp_path):
        self.put(tmp_path, "2026-12-01", 0.1)
        self.put(tmp_path, "2026-12-03", -0.1)
        self.put(tmp_path, "2026-12-02", 0.1)
        (line,) = [line for line in claims.page(tmp_path).splitlines() if "NAdam's" in line]
        assert "| reproduced: better than adamw" in line and "2026-12-03-table2-small" in line

    def test_a_damaged_one_is_one_line(self, tmp_path):
        self.put(tmp_path, "2026-12-01", 0.1)
        (tmp_path / "2026-12-01-table2-small" / "cells.jsonl.xz").write_bytes(b"no xz")
        with pytest.raises(S3Error, match=r"cells.jsonl.xz cannot be read: .*; take it from the history again"):
            claims.page(tmp_path)

    def test_no_folder_is_one_line(self, tmp_path, monkeypatch, capsys):
        """An installation has no records: all claims were "not run yet", as if nothing had been run anywhere."""
        monkeypatch.setattr(sys, "argv", ["claims", str(tmp_path / "none")])
        with pytest.raises(SystemExit, match="2"):
            claims.main()
        assert re.fullmatch(r"error: .*none is no folder: give that of the records.*\n", capsys.readouterr().err)

    def test_one_of_other_rules_is_refused(self, tmp_path):
        self.put(tmp_path, "2026-12-01", 0.1)
        file = tmp_path / "2026-12-01-table2-small" / "table2-small.yaml"
        file.write_text(file.read_text().replace("seeds: [1, 2,", "seeds: [1, 9,"))
        with pytest.raises(S3Error, match="cells of another rules"):
            claims.page(tmp_path)
