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
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from s3_megatron import cli, evidence
from s3_megatron.errors import S3Error
from s3_megatron.evidence import analysis, compare, experiments, quick, text, training, workers
from s3_megatron.evidence.cells import CellsFile
from s3_megatron.evidence.experiments import Setup
from s3_megatron.evidence.plan import Plan
from s3_megatron.evidence.workers import Workers
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
def test_a_killed_comparison_goes_on_as_if_it_had_not_been(quick_file, tmp_path, monkeypatch):
    """SIGTERM to all its processes, as a cluster sends it; SIGKILL, and half a line, as a dying machine leaves it.

    SIGTERM left five semaphores, by a warning of Python's, and Ctrl-C a traceback of each worker that was beginning.
    """
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "s3_megatron.cli", "compare", str(quick_file), "--out", str(stopped)]
    path = stopped / "cells.jsonl"
    for cells, number in ((2, signal.SIGTERM), (5, signal.SIGKILL)):
        process = subprocess.Popen(
            [*command, "--workers", "2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        while not path.exists() or path.read_bytes().count(b"\n") <= cells:
            assert process.poll() is None and time.monotonic() < deadline, "it ended, or did not begin"
            time.sleep(0.05)
        if number == signal.SIGTERM:
            os.killpg(process.pid, number)
            printed, complaints = process.communicate()
            assert process.returncode == 143 and complaints == "", complaints
            assert "stopping: what is trained is kept, and the same command goes on" in printed
        else:
            process.kill()
            process.wait()
    kept = lines(stopped)[1:]
    assert len(kept) < 16, "it was over before it was killed"
    with path.open("a") as file:
        file.write('{"key": "0123456789abcdef", "contender": "s3", "val')
    asked = experiments.load(str(quick_file))
    assert run(asked, stopped)
    assert lines(stopped)[1 : len(kept) + 1] == kept, "a finished cell was run again"
    before = path.read_bytes()
    assert run(asked, stopped) and path.read_bytes() == before, "a whole one runs nothing"
    monkeypatch.setattr(compare, "Workers", InTurn)
    monkeypatch.setattr(InTurn, "corpus", text.load(asked.text), raising=False)
    assert run(asked, whole) and losses(stopped) == losses(whole) and len(losses(whole)) == 16


class Clock:
    """Time that passes only where work is done."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


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


class InTurn:
    """Workers that train each stack in this process, by the code of a worker and a clock that moves on by its steps."""

    clock: "Clock"
    corpus: text.Text

    def __init__(self, count, corpus, device, deadline, kept) -> None:
        self.free, self.cells, self.steps = 1, [], 0
        end = SimpleNamespace(value=deadline)
        workers._here = workers._Here(self.corpus, device, [0], end, kept, workers.here(device))

    def __enter__(self):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_) -> None:
        torch.set_num_threads(self.threads)

    def probe(self, cells):
        self.cells, self.free, self.work = cells, 0, lambda: 1.0

    def train(self, cells):
        self.cells, self.free, self.work = cells, 0, lambda: workers._train(cells, 0)

    def finished(self, _):
        done, self.cells, self.free = self.cells, [], 1
        return [(done, self.work())]


def test_minutes_are_used_and_nothing_that_was_trained_is_lost(corpus, setup, tmp_path, monkeypatch):
    """Real runs of 20 steps, one second each, in calls of 27 seconds: each call uses its time, to 15%.

    Together they take as many steps as one call without an end, and their cells are equal but for the time.
    """
    clock, asked = Clock(), simulated.experiment(names=("s3", "adamw"), setups={"base": setup}, seeds=[1, 2])
    asked = replace(asked, tuning=replace(asked.tuning, runs=5))

    def tick():
        clock.now += 1
        return clock.now

    def clip(*given):
        clipped.append(None)
        return clip_(*given)

    clipped, clip_ = [], training.clip_
    monkeypatch.setattr(training, "clip_", clip)
    monkeypatch.setattr(InTurn, "corpus", corpus, raising=False)
    monkeypatch.setattr(compare, "Workers", InTurn)
    monkeypatch.setattr(compare, "time", clock)
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=tick))
    monkeypatch.setattr(text, "load", lambda name: corpus)

    def call(name, minutes):
        console = Console(file=io.StringIO())
        return compare.compare(asked, tmp_path / name, console, device="cpu", minutes=minutes, workers=1)

    assert call("whole", math.inf) and len(clipped) == 14 * 20
    calls, is_whole = 0, False
    while not is_whole:
        began = clock.now
        is_whole = call("parts", 27 / 60)
        assert is_whole or 0.85 * 27 <= clock.now - began <= 1.15 * 27
        calls += 1
    assert len(clipped) == 2 * 14 * 20 and calls == 13, "a step was taken twice"
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 14
    assert not (tmp_path / "parts" / "unfinished").exists()


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


class TestMemory:
    """How many runs a stack has on a GPU, by its free memory; torch's figure is given here, since there is no GPU."""

    @pytest.fixture(autouse=True)
    def free(self, monkeypatch):
        self.gib = 139.0
        monkeypatch.setattr(compare.torch.cuda, "mem_get_info", lambda: (self.gib * 2**30, 140 * 2**30))

    def test_members_share_it_with_the_other_workers(self):
        setups = experiments.load("table2").setups.values()
        alone, shared = (compare.members_that_fit(setups, "cuda", workers) for workers in (1, 6))
        assert alone == compare.MOST_MEMBERS and 16 <= shared <= alone
        assert compare.members_that_fit(experiments.load("ladder").setups.values(), "cuda", 6) >= 1

    def test_too_little_is_one_line(self):
        self.gib = 0.3
        with pytest.raises(
            S3Error, match=r"a run needs about 0.\d GiB, and each of 6 workers may have 0.0 .*fewer --workers"
        ) as caught:
            compare.members_that_fit(experiments.load("table2").setups.values(), "cuda", 6)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "error, message",
        [
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
                "a stack of 2 does not fit into the GPU's memory",
            ),
            (BrokenProcessPool("gone"), "a worker was killed, perhaps for its memory; what is finished is kept"),
        ],
    )
    def test_what_ends_a_worker_is_one_line(self, error, message):
        """A pool is not started: a future with the error stands in for a worker that ran out of memory."""
        pool, future = Workers.__new__(Workers), Future()
        future.set_exception(error)
        pool._deadline = SimpleNamespace(value=math.inf)
        pool._free, pool._running = [], {future: (0, Plan(simulated.experiment(), "").ready({})[:2])}
        with pytest.raises(S3Error, match=message) as caught:
            pool.finished(1.0)
        assert "\n" not in str(caught.value) and pool.free == 1


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

    def test_what_is_cut_off_at_it_is_no_fault(self):
        """The worker ends itself in mid-step, which breaks the pool; a kill before the deadline is one still."""
        pool, future = Workers.__new__(Workers), Future()
        future.set_exception(BrokenProcessPool("gone"))
        cells = Plan(simulated.experiment(), "").ready({})[:2]
        pool._deadline, pool._free, pool._running = SimpleNamespace(value=0.0), [], {future: (0, cells)}
        assert pool.finished(1.0) == [(cells, None)] and pool.free == 1


class TestRefusals:
    """Bad input: one line, and nothing half-written."""

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"seeds": [0, 1]}, "seed 0 is for tuning and among seeds: must be in one of the two"),
            ({"seeds": [1, 1]}, r"seeds \[1, 1\]: must be distinct"),
            ({"seeds": [10**30]}, r"seeds \[10+\]: must be from 0 to 2147483647"),
            ({"seeds": []}, r"seeds \[\]: must be .*one at least"),
            ({"setups": {}}, "setups: must be one at least"),
            ({"setups": {"base": {"steps": 9, "heads": 0}}}, "setups.base: heads 0: must be > 0"),
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
            good = json.dumps(simulated.run(asked, simulated.losses(0.01), 1)[0])
            file.write(f'{good}\n{{"key": \n{good}\n')
        with pytest.raises(S3Error, match=r"line 3: .*remove the line, and its cell is run again"):
            CellsFile(path, asked, simulated.TEXT)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"validation": "1.5"}, "its validation is '1.5'"),
            ({"spikes": None}, "its spikes is None"),
            ({"contender": ["s3"]}, r"its contender is \['s3'\]"),
            ({"seed": 1.5}, "its seed is 1.5"),
        ],
    )
    def test_a_line_that_was_edited_is_named(self, change, message, tmp_path):
        """A KeyError or a TypeError was all that the report said; it reads the file on its own."""
        asked, path = simulated.experiment(), tmp_path / "cells.jsonl"
        CellsFile(path, asked, simulated.TEXT)
        (cell,) = simulated.run(asked, simulated.losses(0.01), 1)
        with path.open("a") as file:
            file.write(json.dumps({**cell, **change}) + "\n")
        for read in (lambda: CellsFile(path, asked, simulated.TEXT), lambda: analysis.read(path, asked)):
            with pytest.raises(S3Error, match=rf"cells.jsonl, line 2: {message}; remove the line"):
                read()

    @pytest.mark.parametrize("kind", ["a file", "under a file", "read-only"])
    def test_a_folder_that_cannot_be_written(self, kind, quick_file, tmp_path, monkeypatch):
        monkeypatch.setattr(compare, "Workers", _NoWorkers)
        (tmp_path / "a file").touch()
        folder = {"a file": tmp_path / "a file", "under a file": tmp_path / "a file" / "x"}.get(kind, tmp_path / "x")
        if kind == "read-only":  # what a user without rights meets, and the tests' user root does not

            def refused(*_, **__):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

            monkeypatch.setattr(compare, "FileLock", refused)
        with pytest.raises(S3Error, match=r"cannot be written: (File exists|Not a directory|Permission denied)"):
            run(experiments.load(str(quick_file)), folder)

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
        for name in ("statistics", "analysis", "report", "record"):
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
