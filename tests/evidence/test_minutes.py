"""What is begun and what is stopped for the minutes that a comparison has, and what a stack is expected to take."""

import io
import itertools
import math
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from s3_megatron import cli
from s3_megatron.evidence import compare, experiments, workers
from s3_megatron.evidence.cells import CellsFile, code_sha256
from s3_megatron.evidence.experiments import Setup
from s3_megatron.evidence.plan import Plan
from s3_megatron.evidence.workers import Workers
from tests.evidence import simulated
from tests.evidence.comparison import Clock


class Pool:
    """Workers whose stacks take as long as ``seconds`` has it; stands in for processes, which take what they take."""

    def __init__(self, clock, seconds, workers=2, deadline=math.inf) -> None:
        self.clock, self.seconds, self.free, self.running = clock, seconds, workers, []
        self.deadline, self.kept = deadline, {}  # the seconds that stacks were trained for that were stopped

    @property
    def cells(self):
        return [cell for _, cells, _ in self.running for cell in cells]

    steps = 0

    def train(self, cells):
        self.free -= 1
        left = self.kept.pop(cells[0].key, None) or next(self.seconds)
        self.running.append((self.clock.now + left, cells, left))

    def finished(self, _):
        end, cells, seconds = min(self.running, key=lambda running: running[0])
        self.running.remove((end, cells, seconds))
        self.clock.now, self.free = min(end, self.deadline), self.free + 1
        if end > self.deadline:
            self.kept[cells[0].key] = end - self.deadline
            return [(cells, None)]
        return [(cells, [simulated.result(cell, 2.0, seconds=seconds) for cell in cells])]


@pytest.mark.parametrize("expected", [0.5, 1.0, 2.0])
def test_minutes_are_kept(expected, tmp_path, monkeypatch):
    """Stacks of 58 to 62 s, expected to take half, as much or twice: all of two and a half minutes is used, by both.

    A comparison with --minutes 3 ended after 1:32, since no run of eight minutes ended in it. The next call goes on.
    """
    clock = Clock()
    monkeypatch.setattr(compare, "time", clock)
    asked = simulated.experiment(seeds=list(range(1, 40)))
    cells = CellsFile(tmp_path / "cells.jsonl", asked, simulated.TEXT)
    costs = compare.Costs(1, {("base", "s3"): {1: expected * 60 / 100}})
    plan, pool = Plan(asked, simulated.TEXT), Pool(clock, itertools.cycle([58.0, 60.0, 62.0]))
    for call in (1, 2, 3):
        pool.deadline = clock.now + 150
        compare._run(plan, pool, cells, costs, pool.deadline, Console(file=io.StringIO()))
        assert clock.now == pool.deadline == 1000 + 150 * call and not pool.running
        assert 5 * call - 2 <= len(cells.results) <= 5 * call, "of 2.5 runs a call and worker, two are in training"


def test_minutes_count_from_the_command_on(tmp_path, monkeypatch):
    """With --minutes 3 a machine with a load of thirty ended after 5:51: imports before and after were not counted."""
    given, looks = [], iter([100.0, 190.0])
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    monkeypatch.setattr(compare, "compare", lambda *_, minutes, **__: given.append(minutes))
    cli.compare("table2-small", minutes=3, dry_run=True, out=tmp_path)
    assert given == [1.5]


def test_what_ends_in_time_is_begun_first(tmp_path, monkeypatch):
    """A lent machine does not carry home what was stopped: a stack of 10 s is trained before one of 100."""
    clock = Clock()
    monkeypatch.setattr(compare, "time", clock)
    setups = {"long": Setup(steps=100), "short": Setup(steps=10)}
    asked = simulated.experiment(setups=setups, tuning=None, seeds=[1])
    cells = CellsFile(tmp_path / "cells.jsonl", asked, simulated.TEXT)
    costs = compare.Costs(1, {("long", "s3"): {1: 1.0}, ("short", "s3"): {1: 1.0}})
    deadline = clock.now + 130
    pool = Pool(clock, itertools.chain([100.0, 10.0, 10.0], itertools.repeat(100.0)), 1, deadline)
    compare._run(Plan(asked, simulated.TEXT), pool, cells, costs, deadline, Console(file=io.StringIO()))
    assert [result["setup"] for result in cells.results.values()] == ["long", "short", "short"]


def test_the_cost_of_a_stack_is_read_between_the_sizes_measured():
    """On a GPU a small stack takes nearly as long as a large one: in proportion it would be begun too late."""
    costs = compare.Costs(64)
    cells = Plan(simulated.experiment(), simulated.TEXT).ready({}) * 20
    costs.add(cells[:1], 5.0)
    costs.add(cells[:64], 11.3)
    steps = cells[0].setup.steps
    assert costs.of(cells[:1]) == 5.0 * steps and costs.of(cells[:64]) == 11.3 * steps
    assert costs.of(cells[:11]) == pytest.approx(6.0 * steps)
    assert costs.of(cells[:128]) == pytest.approx(22.6 * steps), "in proportion beyond"
    costs.add(cells[:11], 7.0)  # as a finished stack took
    assert costs.of(cells[:11]) == pytest.approx(7.0 * steps)
    only = compare.Costs(64, {("base", "s3"): {4: 2.0}})
    assert only.of(cells[:1]) == 2.0 * steps and only.of(cells[:8]) == 4.0 * steps
    assert compare.Costs(1).of(cells[:1]) == 0.0


@pytest.mark.parametrize("width", [40, 80])
def test_a_budget_of_odd_names_on_a_narrow_terminal(width):
    """A title with [/x] was a MarkupError, one with [small] lost it; at 40 columns figures ended in an ellipsis."""
    setups = {"[bold]": Setup(steps=12345), "qk-norm-unclipped": Setup(steps=12345)}
    asked = simulated.experiment(setups=setups, title="Table 2, [small] [/x]")
    costs = compare.Costs(1, {(name, "s3"): {1: 0.1234} for name in setups})
    console = Console(file=io.StringIO(), width=width)
    console.print(compare.budget(Plan(asked, simulated.TEXT), costs, 2))
    printed = console.file.getvalue()
    assert "…" not in printed and max(map(len, printed.splitlines())) <= width
    letters = "".join(printed.split())
    assert "Table2,[small][/x]" in letters and "[bold]" in letters
    if width == 80:
        assert "qk-norm-unclipped 64 9.3e+15 123.4 812.5" in " ".join(printed.split())


class TestDeadline:
    """A step of the ladder's largest model is 20 s of a core: it was waited for, and so were all probes of its kind."""

    def test_no_probe_begins_after_it_and_the_budget_says_so(self, monkeypatch):
        clock = Clock()
        monkeypatch.setattr(compare, "time", clock)
        plan, begun = Plan(experiments.load("ladder"), simulated.TEXT), []

        class Slow(Pool):
            def probe(self, cells):
                begun.append(cells)
                self.train(cells)

            def finished(self, _):
                return [(cells, 100.0) for cells, _ in super().finished(_)]

        costs = compare._probe(plan, Slow(clock, itertools.cycle([100.0]), workers=1), 1, clock.now + 150)
        assert [cells[0].setup_name for cells in begun] == ["x800k", "x3m"], "of 12 kinds"
        console = Console(file=io.StringIO(), width=120)
        console.print(compare.budget(plan, costs, 1))
        assert "x10m 45 - - -" in " ".join(console.file.getvalue().split())

    @pytest.fixture
    def here(self, monkeypatch, tmp_path):
        """A worker with 25 seconds, and a clock."""
        clock = Clock()
        where = {"card": "a card", "versions": "torch 0"}
        end = SimpleNamespace(value=clock.now + 25)
        monkeypatch.setattr(workers, "time", clock)
        here = workers._Here(None, "cpu", [0], end, tmp_path, where)  # type: ignore[arg-type]
        monkeypatch.setattr(workers, "_here", here, raising=False)
        return here, clock

    def steps_of(self, monkeypatch, clock, seconds):
        """Let training take so long for each step; returns the steps that it takes, and what it would be kept by."""
        taken, kept = [], []

        def train(cells, corpus, device, go_on, *given):
            kept.extend(given)
            for step, its in enumerate(seconds):
                if not go_on(step):
                    return None
                taken.append(step)
                clock.now += its
            return []

        monkeypatch.setattr(workers, "train", train)
        return taken, kept

    def test_a_step_that_would_not_end_before_it_is_not_begun(self, here, monkeypatch):
        """It was cut off in its middle, and all that was trained since the stack was begun was lost."""
        taken, _ = self.steps_of(monkeypatch, here[1], [10.0] * 5)
        assert workers._train(Plan(simulated.experiment(), "").ready({})[:1], 0) is None and taken == [0, 1]

    def test_a_worker_that_is_asked_to_end_takes_no_further_step(self, here, monkeypatch):
        taken, _ = self.steps_of(monkeypatch, here[1], [1.0] * 5)
        workers._end(15, None)
        assert workers._train(Plan(simulated.experiment(), "").ready({})[:1], 0) is None and taken == []

    def test_the_first_step_of_a_probe_is_not_timed(self, here, monkeypatch):
        """It builds what all steps use, and takes many times as long: a budget of hours was days."""
        self.steps_of(monkeypatch, here[1], [15.0, 2.0, 2.0, 2.0, 2.0])
        assert workers._probe(Plan(simulated.experiment(), "").ready({})[:1], 0) == 2.0

    def test_a_stack_is_kept_for_this_code_and_machine(self, here, monkeypatch):
        """On another processor or torch it would go on with other roundings: bits that no machine can have again."""
        _, kept = self.steps_of(monkeypatch, here[1], [1.0])
        cells = Plan(simulated.experiment(), "").ready({})[:2]
        workers._train(cells, 0)
        ((_, by),) = kept
        capability = torch.backends.cpu.get_cpu_capability()
        assert by == [*(cell.key for cell in cells), code_sha256(), "a card", "torch 0", capability]

    def test_a_worker_that_has_not_begun_by_then_is_not_waited_for(self, monkeypatch):
        """With a load of nine --minutes 1.5 took 2:35: one of two workers was importing torch until then."""
        clock, killed, future = Clock(), [], Future()
        monkeypatch.setattr(workers, "time", clock)
        pool = Workers.__new__(Workers)
        cells = Plan(simulated.experiment(), "").ready({})[:1]
        pool._deadline, pool._free, pool._running = SimpleNamespace(value=clock.now), [], {future: (0, cells)}

        def kill():
            killed.append(clock.now)
            future.set_exception(BrokenProcessPool("gone"))

        monkeypatch.setattr(workers.multiprocessing, "active_children", lambda: [SimpleNamespace(kill=kill)])
        clock.now += workers.GRACE_SECONDS
        assert pool.finished(0.0) == [] and not killed, "what is being kept has its time"
        clock.now += 1
        assert pool.finished(1.0) == [(cells, None)] and len(killed) == 1

    def test_what_is_cut_off_at_it_is_no_fault(self):
        """The worker ends itself in mid-step, which breaks the pool; a kill before the deadline is one still."""
        pool, future = Workers.__new__(Workers), Future()
        future.set_exception(BrokenProcessPool("gone"))
        cells = Plan(simulated.experiment(), "").ready({})[:2]
        pool._deadline, pool._free, pool._running = SimpleNamespace(value=0.0), [], {future: (0, cells)}
        assert pool.finished(1.0) == [(cells, None)] and pool.free == 1
