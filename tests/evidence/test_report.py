"""The report's tables against the cells file, by other code; and a report of what is not finished."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from s3_megatron.errors import S3Error
from s3_megatron.evidence import analysis, report
from s3_megatron.evidence.experiments import Entry, Setup, Tuning
from s3_megatron.evidence.plan import Plan
from tests.evidence import simulated
from tests.evidence.comparison import tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole experiment with a planted winner, spikes, and one run of Lion's that ended in NaN."""
    asked, folder = simulated.experiment(), tmp_path_factory.mktemp("whole")
    results = simulated.run(asked, simulated.losses(0.01, {"s3": -0.05}))
    for i, result in enumerate(results):
        result["spikes"] = [[50, 2, 0.3]] * (i % 3)
    last = [r for r in results if r["contender"] == "lion" and r["seed"] == 8][-1]
    last.update(validation=None, diverged=40)
    simulated.write(folder / "cells.jsonl", asked, results)
    report.write(asked, folder)
    return folder


@pytest.fixture(scope="module")
def cells(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def whole(folder):
    return tables((folder / "report.md").read_text())


def at_best(cells, name):
    """Final losses by seed: the seeds other than 0 are run at the best configuration alone."""
    runs = {c["seed"]: c["validation"] for c in cells if c["contender"] == name and c["seed"] != 0}
    return np.array([math.log(256) + 1 if runs[seed] is None else runs[seed] for seed in range(1, 9)])


def test_the_best_configurations_follow_from_the_cells(whole, cells):
    for row in whole["Best configurations"]:
        tuning = [c for c in cells if (c["contender"], c["seed"]) == (row["contender"], 0)]
        best = min(tuning, key=lambda c: c["validation"])
        losses = at_best(cells, row["contender"])
        mine = [c for c in cells if c["contender"] == row["contender"] and c["seed"] != 0]
        assert row == {
            "contender": row["contender"],
            "rate": f"{best['rate']:g}",
            "settings": f"beta {best['settings']['beta']}",
            "seeds": "8 of 8",
            "mean": f"{losses.mean():.4f}",
            "std": f"{losses.std(ddof=1):.4f}",
            "spikes": str(sum(len(c["spikes"]) for c in mine)),
            "diverged": "1" if row["contender"] == "lion" else "0",
        }


def test_the_differences_follow_from_the_cells(whole, cells):
    rows = whole["Differences to s3"]
    assert [row["rival"] for row in rows] == ["adamw", "nadam", "lion"]
    beyond = []
    for row in rows:
        theirs, ours = at_best(cells, row["rival"]), at_best(cells, "s3")
        test = stats.ttest_rel(theirs, ours)
        assert row["mean"] == f"{(theirs - ours).mean():.4f}"
        assert row["95% interval"] == "{:.4f} to {:.4f}".format(*test.confidence_interval(0.95))
        assert row["p"] == f"{test.pvalue:.2g}"
        assert row["p (Wilcoxon)"] == f"{stats.wilcoxon(theirs, ours).pvalue:.2g}"
        beyond.append(2 * stats.ttest_rel(theirs - 0.01, ours, alternative="greater").pvalue)
        assert row["p beyond 0.01"] == f"{min(1, beyond[-1]):.2g}"
    smallest, middle, largest = np.argsort(beyond)
    assert rows[smallest]["p beyond 0.01 (Holm)"] == f"{3 * beyond[smallest]:.2g}"
    assert rows[middle]["p beyond 0.01 (Holm)"] == f"{max(3 * beyond[smallest], 2 * beyond[middle]):.2g}"
    assert rows[largest]["s3"] == "no difference shown"  # one of Lion's eight is at ln 256 + 1
    assert [row["s3"] for row in rows][:2] == ["better", "better"]


def test_every_configuration_follows_from_the_cells(whole, cells):
    rows, counted = whole["By rate"], 0
    for row in rows:
        runs = [
            c
            for c in cells
            if c["contender"] == row["contender"]
            and (f"{c['rate']:g}", f"beta {c['settings']['beta']}") == (row["rate"], row["settings"])
            and (c["seed"] == 0) == (row["runs"] == "tuning")
        ]
        losses = [math.log(256) + 1 if c["validation"] is None else c["validation"] for c in runs]
        assert row["mean"] == f"{np.mean(losses):.4f}"
        assert row["std"] == ("-" if len(runs) == 1 else f"{np.std(losses, ddof=1):.4f}")
        assert row["spikes a run"] == f"{np.mean([len(c['spikes']) for c in runs]):.2f}"
        assert row["diverged"] == f"{sum(c['diverged'] is not None for c in runs)} of {len(runs)}"
        counted += len(runs)
    assert counted == len(cells) == 4 * 16


def test_the_widths_follow_from_the_cells(whole, cells):
    for row, best in zip(whole["Width"], whole["Best configurations"], strict=True):
        losses = {
            f"{c['rate']:g}": c["validation"]
            for c in sorted(cells, key=lambda c: c["rate"])
            if (c["contender"], c["seed"]) == (row["contender"], 0)
            and f"beta {c['settings']['beta']}" == best["settings"]
        }
        good = [rate for rate, loss in losses.items() if loss <= min(losses.values()) + 0.05]
        assert (row["lowest"].split()[-1], row["highest"].split()[-1]) == (good[0], good[-1])
        assert row["ratio"].split()[-1] == f"{float(good[-1]) / float(good[0]):.3g}"
        assert row["lowest"].startswith(">") is False and row["highest"].startswith(">=") == (
            good[-1] == list(losses)[-1]
        )


def test_every_run_is_named(whole, cells):
    assert {(row["cell"], row["seed"], row["spikes"]) for row in whole["Cells"]} == {
        (c["key"], str(c["seed"]), str(len(c["spikes"]))) for c in cells
    }


def test_the_report_says_what_is_whole(folder):
    text = (folder / "report.md").read_text()
    assert "64 of 64 cells. 3 of 3 pairs are ranked; s3 against adamw: better; nadam: better; lion: no" in text
    assert "Not run yet" not in text and "- hours of training: 0.64" in text
    assert "![rates.png](rates.png)" in text and "![differences.png](differences.png)" in text
    assert {file.name for file in folder.iterdir()} == {"cells.jsonl", "report.md", "rates.png", "differences.png"}


@pytest.mark.parametrize("count", range(0, 64, 3))
def test_a_report_of_a_part_says_so_and_ranks_only_what_is_whole(count):
    """At every third cell: pairs without all their seeds have no verdict, and what is missing is counted."""
    asked = simulated.experiment()
    found = analysis.Analysis(asked, simulated.run(asked, simulated.losses(0.01, {"s3": -0.05}), count))
    text = report.render({"commit": "abc"}, found)
    assert f"{count} of 64 cells." in text
    rows = tables(text)["Differences to s3"]
    for row in rows:
        is_whole = row["seeds"] == "8 of 8"
        assert row["s3"] == ("better" if is_whole else f"not ranked: {row['seeds']} seeds")
    ranked = sum(row["seeds"] == "8 of 8" for row in rows)
    assert ("Nothing is ranked yet" in text) == (ranked == 0)
    assert len(re.findall(r"^- \w+: .*(tuning runs|seeds at rate)", text, re.M)) >= 1
    assert ("## Cells" in text) == (count > 0)


def test_a_rival_that_lacks_a_seed_counts_as_a_test_to_come():
    """By the p-value that it has so far it would lower the others' adjusted ones, and its last seed take them back."""
    asked = simulated.experiment()
    cells = simulated.run(asked, simulated.losses(0.01, {"s3": -0.05}))
    found = analysis.Analysis(asked, [c for c in cells if (c["contender"], c["seed"]) != ("nadam", 8)])
    adamw, nadam, lion = found.ranking("base")
    assert math.isnan(nadam.adjusted) and nadam.verdict == "not ranked: 7 of 8 seeds"
    low, high = sorted((adamw, lion), key=lambda ranked: ranked.paired.beyond)
    assert (low.adjusted, high.adjusted) == (3 * low.paired.beyond, max(3 * low.paired.beyond, 2 * high.paired.beyond))


def test_while_a_contender_is_tuned_its_rates_are_those_at_the_settings_that_are_best_so_far():
    """The worse settings have one rate, whose width says nothing."""
    asked = simulated.experiment(names=("s3",))
    cells = simulated.run(
        asked, lambda cell: 2 + abs(math.log(cell.rate / 4e-3)) + 2 * (json.loads(cell.settings)["beta"] == 0.9), 7
    )
    assert {c["settings"]["beta"] for c in cells} == {0.9, 0.95} and {c["seed"] for c in cells} == {0}
    runs = analysis.Analysis(asked, cells).by_rate("s3", "base")
    assert list(runs) == sorted(c["rate"] for c in cells if c["settings"]["beta"] == 0.95)


def test_an_experiment_without_tuning_ranks_nothing():
    """Its rates were chosen on the seeds that it has."""
    asked = simulated.experiment(tuning=None, paper={"adamw": "4.78 at 3e-4"})
    found = analysis.Analysis(asked, simulated.run(asked, simulated.losses(0.01, {"s3": -0.05})))
    text = report.render({}, found)
    assert "128 of 128 cells. Nothing is ranked here" in text and "Differences" not in text
    assert len(tables(text)["By rate"]) == 16 and tables(text)["The paper's figures"][0]["the paper"] == "4.78 at 3e-4"
    assert "arXiv 2507.06464's, not ours" in text


def test_a_report_of_tuning_by_several_seeds_says_so_and_its_means_follow_from_the_cells():
    tuning = Tuning(seeds=[0, 20, 30], runs=18)
    asked = simulated.experiment(tuning=tuning)
    cells = simulated.run(asked, simulated.losses(0.02, {"s3": -0.05}))
    text = report.render({}, analysis.Analysis(asked, cells))
    chosen = "Chosen by the mean over 3 tuning seeds (0, 20, 30), of 6 configurations a contender."
    assert chosen in text and "at the best settings, by the mean over 3 tuning seeds." in text
    assert f"{4 * 26} of {4 * 26} cells. 3 of 3 pairs are ranked" in text and "Not run yet" not in text
    found = tables(text)
    tuned = [row for row in found["By rate"] if row["runs"] == "tuning"]
    means = {}
    for row in tuned:
        its = (row["contender"], row["rate"], row["settings"])
        losses = [
            c["validation"]
            for c in cells
            if (c["contender"], f"{c['rate']:g}", f"beta {c['settings']['beta']}") == its and c["seed"] in tuning.seeds
        ]
        assert len(losses) == 3 and row["mean"] == f"{np.mean(losses):.4f}"
        assert row["std"] == f"{np.std(losses, ddof=1):.4f}"
        means[its] = np.mean(losses)
    assert len(tuned) == 4 * 6
    for row in found["Best configurations"]:
        best = min((its for its in means if its[0] == row["contender"]), key=means.__getitem__)
        assert (row["contender"], row["rate"].split()[0], row["settings"]) == best and row["seeds"] == "8 of 8"
    part = report.render({}, analysis.Analysis(asked, cells[:10]))
    assert "- s3: 10 of 18 tuning runs are finished, no final run can start before" in part
    one = simulated.experiment()
    assert "Chosen by" not in report.render({}, analysis.Analysis(one, []))


def kicked(asked, setup, seed, gap, moves, largest):
    """A run of 100 steps with a kick in step 30: the loss is ``gap[i]`` above the twin's i steps after it."""
    cell = Plan(asked, simulated.TEXT).cell("s3", setup, (8e-3, "{}"), seed)
    losses = [2.0] * 31 + [2.0 + g for g in gap] + [2.0] * (69 - len(gap))
    means = [0.2] * 31 + moves + [0.2] * (69 - len(moves))
    return simulated.result(cell, 2.0, losses=losses, update_mean=means, update_max=[0.5] * 30 + [largest] + [0.9] * 69)


def test_recovery_by_hand():
    """Loss: the mean of 16 gaps is below .02 first from step 5 on: .31 in all are .0194. |u|: within 10% after 7."""
    base = Setup(steps=100, watch_every=1, kick_step=30)
    # A kicked run's twin is the one that is equal but for the kick: x1-qk is none of x1e2.
    setups = {"x1": base, "x1e2": replace(base, kick=100.0), "x1-qk": replace(base, qk_norm=True)}
    asked = simulated.experiment(setups=setups, contenders={"s3": Entry("s3", [8e-3])}, seeds=[1, 2], tuning=None)
    gap = [1.0, 0.5, 0.2, 0.2, 0.02] + [0.31] + [0.0] * 10
    results = [
        *(kicked(asked, setup, seed, [], [], 0.9) for setup in ("x1", "x1-qk") for seed in (1, 2)),
        kicked(asked, "x1e2", 1, gap, [0.5] * 6 + [0.23] + [0.219] * 20, 7.0),
        kicked(asked, "x1e2", 2, [3.0] * 69, [0.5] * 69, 1.0),
    ]
    found = analysis.Analysis(asked, results)
    assert [(r.seed, r.loss, r.update, r.largest) for r in found.recoveries()] == [(1, 5, 7, 7.0), (2, None, None, 1.0)]
    (row,) = tables(report.render({}, found))["Recovery"]
    assert (row["K"], row["largest \\|u\\|"], row["steps, loss"]) == ("100", "7", "never (5 to never)")


@pytest.mark.parametrize("what", ["weights", "order"])
def test_cells_of_one_seed_that_started_differently_are_refused(what, tmp_path):
    asked = simulated.experiment()
    results = simulated.run(asked, simulated.losses(0.01), 6)
    results[3][what] = "other"
    simulated.write(tmp_path / "cells.jsonl", asked, results)
    with pytest.raises(S3Error, match=rf"cells \w+ and {results[3]['key']} have seed 0 and another hash of {what}"):
        report.write(asked, tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_a_report_needs_cells_of_its_experiment(tmp_path):
    asked = simulated.experiment()
    with pytest.raises(S3Error, match=r"cells\.jsonl cannot be read: No such file.*s3-megatron compare writes it"):
        report.write(asked, tmp_path)
    simulated.write(tmp_path / "cells.jsonl", simulated.experiment(seeds=[1, 2]), [])
    with pytest.raises(S3Error, match=r"cells of another rules .*check out commit abc"):
        report.write(asked, tmp_path)


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    asked = simulated.experiment()
    simulated.write(tmp_path / "cells.jsonl", asked, simulated.run(asked, simulated.losses(0.01), 6))
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"key": "0123')
    assert "6 of 64 cells." in report.write(asked, tmp_path).read_text()
    assert (
        (tmp_path / "cells.jsonl").read_text().endswith('{"key": "0123')
    )  # another process may be in the middle of it


def test_one_rate_has_no_width():
    """The report of `spike` had five tables of `<= 0.008 to >= 0.008`."""
    for rates in ([0.01], [0.01, 0.02]):
        contenders = {name: Entry("s3", rates, {"beta": 0.95}) for name in ("s3", "adamw")}
        asked = simulated.experiment(tuning=None, contenders=contenders)
        text = report.render({}, analysis.Analysis(asked, simulated.run(asked, simulated.losses(0.01))))
        assert ("## Width" in text) == ("at the edge" in text) == (len(rates) > 1)


def test_the_best_of_the_rates_follows_from_the_cells():
    """Without tuning: the lowest mean of the rates with all seeds, beside the paper's figure; nothing is ranked."""
    asked = simulated.experiment(tuning=None, paper={"adamw": "4.78 at 3e-4"})
    cells = simulated.run(asked, simulated.losses(0.01, {"s3": -0.05}))
    rows = {row["contender"]: row for row in tables(report.render({}, analysis.Analysis(asked, cells)))["Best rates"]}
    means, best = {}, {}
    for name in asked.contenders:
        by_rate = {
            rate: [c["validation"] for c in cells if (c["contender"], c["rate"]) == (name, rate)]
            for rate in simulated.RATES
        }
        rate = min(by_rate, key=lambda rate: np.mean(by_rate[rate]))
        means[name], best[name] = rate, np.array(by_rate[rate])
        edge = " (at the edge)" if rate in (simulated.RATES[0], simulated.RATES[-1]) else ""
        row = rows[name]
        assert (row["rate"], row["mean"]) == (f"{rate:g}{edge}", f"{best[name].mean():.4f}")
        assert (row["std"], row["the paper"]) == (
            f"{best[name].std(ddof=1):.4f}",
            "4.78 at 3e-4" if name == "adamw" else "-",
        )
    for name in ("adamw", "nadam", "lion"):
        test = stats.ttest_rel(best[name], best["s3"])
        assert rows[name]["difference"] == f"{(best[name] - best['s3']).mean():.4f}"
        assert rows[name]["95% interval"] == "{:.4f} to {:.4f}".format(*test.confidence_interval(0.95))
        assert rows[name]["p"] == f"{test.pvalue:.2g}"
    few = analysis.Analysis(asked, [c for c in cells if (c["contender"], c["seed"]) != ("lion", 8)])
    assert few.best("lion", "base") is None and few.best("nadam", "base")
