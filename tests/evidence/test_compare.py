"""The command: interrupted and continued, its minutes, and what it refuses; each refusal is one line."""

import errno
import io
import itertools
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from s3_megatron import cli, evidence
from s3_megatron.errors import S3Error
from s3_megatron.evidence import compare, experiments, plan, quick
from s3_megatron.evidence.cells import CellsFile
from s3_megatron.evidence.experiments import Tuning
from s3_megatron.evidence.plan import Plan
from tests.evidence import simulated

# What may differ between two runs of a cell.
ELSEWHERE = ("seconds", "at", "stack", "commit")


def run(asked, folder, workers=2):
    console = Console(file=io.StringIO())
    return compare.compare(asked, folder, console, device="cpu", minutes=60, workers=workers)


def lines(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def losses(folder):
    return {c["key"]: {k: v for k, v in c.items() if k not in ELSEWHERE} for c in lines(folder)[1:]}


@pytest.fixture(scope="module")
def quick_file(tmp_path_factory) -> Path:
    """The quick experiment with two contenders and its text elsewhere."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "text.xz").write_bytes(lzma.compress(quick.text(), preset=0))
    content = yaml.safe_load((experiments.CONFIGS / "quick.yaml").read_text())
    del content["contenders"]["lion"]
    content |= {"text": str(folder / "text.xz"), "seeds": [1, 2]}
    (folder / "quick.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "quick.yaml"


@pytest.mark.slow
def test_a_killed_comparison_goes_on_as_if_it_had_not_been(quick_file, tmp_path):
    """SIGKILL after the third cell, and half a line at the end of the file, as a dying machine leaves it."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [
        sys.executable,
        "-m",
        "s3_megatron.cli",
        "compare",
        str(quick_file),
        "--out",
        str(killed),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    path, deadline = killed / "cells.jsonl", time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or did not begin"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = lines(killed)[1:]
    assert len(kept) < 16, "it was over before it was killed"
    with path.open("a") as file:
        file.write('{"key": "0123456789abcdef", "contender": "s3", "val')
    asked = experiments.load(str(quick_file))
    assert run(asked, killed) and run(asked, whole, workers=1)
    assert losses(killed) == losses(whole) and len(losses(whole)) == 16
    assert lines(killed)[1 : len(kept) + 1] == kept, "a finished cell was run again"
    before = path.read_bytes()
    assert run(asked, killed) and path.read_bytes() == before, "a whole one runs nothing"


class Clock:
    """Time that passes only where work is done."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Pool:
    """Workers whose stacks take as long as ``seconds`` has it; stands in for processes, which take what they take."""

    def __init__(self, clock, seconds, workers=2) -> None:
        self.clock, self.seconds, self.free, self.running, self.ends = clock, seconds, workers, [], []

    @property
    def cells(self):
        return [cell for _, cells in self.running for cell in cells]

    steps = 0

    def train(self, cells):
        self.free -= 1
        self.running.append((self.clock.now + next(self.seconds), cells))

    def finished(self, _):
        end, cells = min(self.running, key=lambda running: running[0])
        self.running.remove((end, cells))
        self.clock.now, self.free = end, self.free + 1
        self.ends.append(end)
        return [(cells, [simulated.result(cell, 2.0) for cell in cells])]


@pytest.mark.parametrize("expected", [0.5, 1.0, 2.0])
def test_minutes_are_kept(expected, tmp_path, monkeypatch):
    """Stacks of 58 to 62 s, expected to take half, as much or twice: within 15% of 30 minutes, and never over them.

    What was measured at first may be wrong; each finished stack sets it right.
    """
    clock = Clock()
    monkeypatch.setattr(compare, "time", clock)
    asked = simulated.experiment(seeds=list(range(1, 40)))
    cells = CellsFile(tmp_path / "cells.jsonl", asked, simulated.TEXT)
    pool = Pool(clock, itertools.cycle([58.0, 60.0, 62.0]))
    costs = compare.Costs(1, {("base", "s3"): expected * 60 / 100})
    plan = Plan(asked, simulated.TEXT)
    compare._run(plan, pool, cells, costs, clock.now + 1800, Console(file=io.StringIO()))
    assert 0.85 * 1800 <= pool.ends[-1] - 1000 <= 1800
    assert len(cells.results) == len(pool.ends) and not pool.running


def test_stacks_keep_the_order_of_value_and_no_two_kinds_meet():
    asked = simulated.experiment()
    cells = Plan(asked, simulated.TEXT).ready({})
    other = [replace(cell, optimizer="adamw") for cell in cells[:3]]
    some = list(compare.stacks([*cells, *other], 5))
    assert cells[0] in some[0] and [len(stack) for stack in some] == [5, 5, 5, 1, 3]
    assert all(len({compare.kind(cell) for cell in stack}) == 1 for stack in some)


class TestTuning:
    """The rule of tuning in docs/evidence.md."""

    def tune(self, loss, runs=8, **entry):
        """Run it to its end; returns what was tried, in order, and what it found."""
        given = {"optimizer": "s3", "rates": simulated.RATES, "settings": {"beta": 0.95}, **entry}
        tried = {}
        while True:
            found = plan.tune(experiments.Entry(**given), Tuning(0, runs), 2.0, tried)
            if found.best:
                return list(tried), found
            tried |= {c: loss(c[0], json.loads(c[1])["beta"]) for c in found.wanted}

    @pytest.mark.parametrize("best", [1e-4, 1.3e-3, 3e-3, 0.1])
    @pytest.mark.parametrize("runs", [4, 5, 8, 20])
    def test_the_budget_is_spent_to_the_last_run_and_the_best_is_inside_or_marked(self, best, runs):

        tried, found = self.tune(lambda rate, beta: abs(math.log(rate / best)), runs)
        assert len(tried) == len(set(tried)) == runs
        rates = sorted(rate for rate, settings in tried if settings == found.best[1])
        assert found.at_edge == (found.best[0] in (rates[0], rates[-1]))
        if runs == 20:
            assert not found.at_edge and abs(math.log(found.best[0] / best)) < 0.1  # a fourth root of 2 at most

    def test_settings_are_tried_at_the_best_rate_in_the_files_order(self):

        tried, found = self.tune(
            lambda rate, beta: abs(math.log(rate / 4e-3)) + abs(beta - 0.9), sweep={"beta": [0.98, 0.9]}
        )
        assert [(rate, json.loads(s)["beta"]) for rate, s in tried[4:6]] == [(4e-3, 0.98), (4e-3, 0.9)]
        assert found.best == (4e-3, '{"beta": 0.9}')

    def test_what_diverged_is_the_worst(self):

        _, found = self.tune(lambda rate, beta: math.inf if rate > 3e-3 else 2 - rate)
        assert found.best[0] < 4e-3 and not found.at_edge


@pytest.mark.parametrize("path", sorted(experiments.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_can_be_planned_and_is_in_the_page_of_rules(path):
    asked = experiments.load(path.stem)
    assert Plan(asked, simulated.TEXT).ready({})
    assert f"`{path.stem}`" in (Path(__file__).parents[2] / "docs/evidence.md").read_text()


class TestRefusals:
    """Bad input: one line, and nothing half-written."""

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"seeds": [0, 1]}, "seed 0 is for tuning and among seeds: must be in one of the two"),
            ({"seeds": [1, 1]}, r"seeds \[1, 1\]: must be distinct"),
            (
                {"contenders": {"s3": {"optimizer": "adamx", "rates": [1e-3]}}},
                "contenders.s3: optimizer adamx: must be one of s3",
            ),
            (
                {"contenders": {"s3": {"optimizer": "s3", "rates": [2e-3, 1e-3]}}},
                "rates .*: must be positive and rising",
            ),
            (
                {"contenders": {"s3": {"optimizer": "lion", "rates": [1e-3], "settings": {"beta": 0.9}}}},
                "setting beta of lion",
            ),
            ({"reference": "s4"}, "reference s4: must be one of s3, adamw"),
            ({"paper": {"s4": "1"}}, "paper.s4: must be one of s3"),
            ({"tuning": {"seed": 0, "runs": 2}}, "contenders.s3 has 3 rates: must be at most tuning.runs"),
            ({"sedes": [1]}, "there is no setting 'sedes'"),
            ({"neighbours": "1"}, "neighbours is '1': it must be a int"),
        ],
    )
    def test_an_experiment_that_contradicts_itself(self, change, message, quick_file, tmp_path):
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(quick_file.read_text()) | change, sort_keys=False))
        with pytest.raises(S3Error, match=message) as caught:
            experiments.load(str(path))
        assert str(caught.value).startswith("bad.yaml: ") and "\n" not in str(caught.value)

    def test_an_unknown_experiment_names_those_there_are(self):
        with pytest.raises(S3Error, match=r"there is no experiment 'tabel2': .*one of .*table2-small"):
            experiments.load("tabel2")

    @pytest.mark.parametrize("what", ["experiment", "rules", "text", "code"])
    def test_cells_of_something_else(self, what, tmp_path):
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        CellsFile(path, asked, simulated.TEXT)
        head = json.loads(path.read_text())
        path.write_text(json.dumps({**head, what: "other", "commit": "abc"}) + "\n")
        before = path.read_bytes()
        with pytest.raises(S3Error, match=rf"cells of another {what} \(other.*check out commit abc") as caught:
            CellsFile(path, asked, simulated.TEXT)
        assert path.read_bytes() == before and "\n" not in str(caught.value)

    def test_a_broken_line_in_the_middle_is_named(self, tmp_path):
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        CellsFile(path, asked, simulated.TEXT)
        with path.open("a") as file:
            file.write('{"key": "1"}\n{"key": \n{"key": "2"}\n')
        with pytest.raises(S3Error, match=r"line 3: .*remove the line, and its cell is run again"):
            CellsFile(path, asked, simulated.TEXT)

    @pytest.mark.parametrize("torn", ["{", '{"experiment": "simul', '{"experiment": "x"}'])
    def test_a_first_line_that_was_cut_short_begins_anew(self, torn, tmp_path):
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        path.write_text(torn)
        CellsFile(path, asked, simulated.TEXT)
        assert json.loads(path.read_text())["experiment"] == "simulated"

    def test_a_full_disk_leaves_whole_lines(self, tmp_path, monkeypatch):
        """The system takes a part of a line and then has no room: the part is taken back."""
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        file = CellsFile(path, asked, simulated.TEXT)
        first, second = simulated.run(asked, simulated.losses(0.01), 2)
        file.add([first])
        before = path.read_bytes()

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(S3Error, match=r"cannot be written: No space left on device; what it has is whole"):
            file.add([second])
        assert path.read_bytes() == before and second["key"] not in file.results
        monkeypatch.undo()
        file.add([second])
        assert len(CellsFile(path, asked, simulated.TEXT).results) == 2

    def test_scipy_is_asked_for_before_anything_is_trained(self, monkeypatch):
        for name in [name for name in sys.modules if name.startswith(("scipy", "s3_megatron.evidence.statistics"))]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("statistics", "findings", "report", "record"):
            monkeypatch.delitem(sys.modules, f"s3_megatron.evidence.{name}", raising=False)
            monkeypatch.delattr(evidence, name, raising=False)
        monkeypatch.setitem(sys.modules, "scipy", None)
        with pytest.raises(S3Error, match=r"compare needs scipy: pip install 's3-megatron\[evidence\]'"):
            cli.compare("table2-small")

    def test_a_folder_in_use(self, quick_file, tmp_path, monkeypatch):
        from filelock import FileLock

        monkeypatch.setattr(compare, "Workers", _NoWorkers)
        with FileLock(tmp_path / ".lock"), pytest.raises(S3Error, match="another comparison writes into"):
            run(experiments.load(str(quick_file)), tmp_path)
        assert not (tmp_path / "cells.jsonl").exists()


class _NoWorkers:
    """Nothing is to be started where nothing can be written."""

    def __init__(self, *_) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass
