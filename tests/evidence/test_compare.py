"""The command as a whole: killed, or stopped at the end of its minutes, it goes on as if it had not been."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

import s3_megatron
from s3_megatron.evidence import cells, compare, experiments, text, training, workers
from tests.evidence import simulated
from tests.evidence.comparison import Clock, run
from tests.terminal import lives

# What may differ between two runs of a cell.
ELSEWHERE = ("seconds", "at", "stack", "commit")


def lines(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def losses(folder):
    return {c["key"]: {k: v for k, v in c.items() if k not in ELSEWHERE} for c in lines(folder)[1:]}


@pytest.mark.slow
def test_a_killed_comparison_goes_on_as_if_it_had_not_been(quick_file, tmp_path, monkeypatch):
    """SIGTERM to all its processes, as a cluster sends it; SIGKILL of a worker, as for its memory, whose neighbour
    keeps what it trains; SIGKILL, and half a line, as a dying machine leaves it.

    SIGTERM left five semaphores, by a warning of Python's, and Ctrl-C a traceback of each worker that was beginning.
    """
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "s3_megatron.cli", "compare", str(quick_file), "--out", str(stopped)]
    path = stopped / "cells.jsonl"
    for count, victim in ((2, "all"), (4, "worker"), (6, "parent")):
        process = subprocess.Popen(
            [*command, "--workers", "2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        while not path.exists() or path.read_bytes().count(b"\n") <= count:
            assert process.poll() is None and time.monotonic() < deadline, "it ended, or did not begin"
            time.sleep(0.05)
        if victim == "worker":
            workers_now = [p for p in psutil.Process(process.pid).children() if "spawn_main" in "".join(p.cmdline())]
            workers_now[0].kill()
            _, complaints = process.communicate()
            assert process.returncode == 2 and complaints == f"error: {workers.KILLED}\n", complaints
            assert not any(map(lives, workers_now)), "a worker was left behind"
        elif victim == "all":
            os.killpg(process.pid, signal.SIGTERM)
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
    monkeypatch.setattr(text, "load", lambda *of: corpus)

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


def test_the_commit_is_this_projects(tmp_path, monkeypatch):
    """An environment lay in another project's checkout, and cells were recorded with that project's commit."""
    words = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / ".gitignore").write_text(".venv\n")
    (tmp_path / ".venv").mkdir()
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*words, *command], check=True)
    monkeypatch.setattr(cells, "__file__", str(tmp_path / ".venv" / "cells.py"))
    (tmp_path / ".venv" / "cells.py").touch()
    assert cells.commit() == f"unknown (release {s3_megatron.__version__})"
    subprocess.run([*words, "add", "-f", ".venv/cells.py"], check=True)
    subprocess.run([*words, "commit", "-q", "-m", "ours"], check=True)
    assert re.fullmatch(r"[0-9a-f]{10}", cells.commit())
    (tmp_path / ".venv" / "cells.py").write_text("changed\n")
    assert re.fullmatch(r"[0-9a-f]{10}-dirty", cells.commit())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cells.commit().startswith("unknown"), "without git"


@pytest.mark.parametrize(
    "name, counts",
    [
        *((f"evidence/{name}.py", True) for name in ("contenders", "stack", "text", "training", "unfinished")),
        *((f"kernels/{name}", True) for name in ("foreach.py", "cpu/softsignum.cpp", "cpu/step.h")),
        *(("optim/polar.py", True), ("evidence/report.py", False)),
    ],
)
def test_the_codes_hash_is_of_all_that_a_runs_losses_follow_from(name, counts, tmp_path, monkeypatch):
    """Cells of two codes side by side compare nothing; a change of the report keeps a night's cells."""
    package = tmp_path / "s3_megatron"
    for part in cells.CODE:
        source = Path(s3_megatron.__file__).parent / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, made(package / part))
    made(package / name).touch()
    monkeypatch.setattr(s3_megatron, "__file__", str(package / "__init__.py"))
    before = cells.code_sha256()
    with (package / name).open("a") as file:
        file.write(" ")
    assert (cells.code_sha256() != before) == counts


def made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
