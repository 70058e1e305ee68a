"""However the demonstration is ended, and whenever: no process of it is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.launcher import ROOT
from tests.terminal import lives

SECONDS = 200  # for what takes five on a machine that has nothing else to do


class Demo:
    """A running demonstration, with ranks that only log, started as a background job of a shell would be."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.output = folder / "output"
        settings = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env}
        # What sh does for `make demo &`: SIGINT is ignored, and Python then installs no handler of its own.
        command = ["sh", "-c", 'trap "" INT; exec "$@"', "-", sys.executable, "-m", "tests.demo.stand_in"]
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **settings}, stdout=file, stderr=file
            )

    def said(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until ``text`` is printed, and a little into what it announces."""
        end = time.monotonic() + SECONDS
        while text not in self.said():
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)
        time.sleep(0.3)

    def end(self, *signals: int) -> int:
        """Send the signals one after the other; gives the exit code once nothing of the demonstration is left."""
        family = self.family()
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.2)
        code = self.process.wait(SECONDS)
        end = time.monotonic() + SECONDS
        while any(map(lives, family)):
            assert time.monotonic() < end, [process.cmdline() for process in family if lives(process)]
            time.sleep(0.05)
        return code

    def family(self) -> list[psutil.Process]:
        """All processes below it."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Demo]]:
    """Start a Demo; what a failed test leaves of it is killed."""
    started: list[Demo] = []

    def start(folder: Path, **env: str) -> Demo:
        started.append(Demo(folder, **env))
        return started[-1]

    yield start
    for demo in started:
        for process in (*demo.family(), demo.process):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        demo.process.wait()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Demo]) -> Path:
    """The corpus and its tokens, made by a demonstration that was ended after that."""
    folder = tmp_path_factory.mktemp("made")
    demo = start(folder, TORCH="1", PAUSE="1")
    demo.wait_for("S3: starting ranks")
    assert demo.end(signal.SIGTERM) == 143
    return folder / "runs/corpus"


@pytest.mark.parametrize(
    ("stage", "how"), [("tokenizer: training", "SIGINT"), ("tokenizer: training", "SIGKILL"), ("corpus: ", "SIGHUP")]
)
def test_before_there_are_tokens(tmp_path: Path, start: Callable[..., Demo], stage: str, how: str):
    """SentencePiece's C++ kept Ctrl-C waiting for as long as it took."""
    demo = start(tmp_path, PAUSE="1")
    demo.wait_for(stage)
    number = getattr(signal, how)
    assert demo.end(number) == (-9 if how == "SIGKILL" else 128 + number), demo.said()


@pytest.mark.parametrize(
    ("stage", "signals", "pause"),
    [
        ("S3: starting ranks", ["SIGINT"], "0.1"),
        ("S3: iteration 1 ", ["SIGINT", "SIGINT", "SIGINT"], "0.1"),
        ("S3: iteration 1 ", ["SIGKILL"], "0.1"),
        ("S3, one rank killed: the same command again", ["SIGTERM", "SIGINT"], "0.01"),
        ("S3, one rank killed: done", ["SIGHUP"], "0.01"),
        ("AdamW: done", ["SIGTERM"], "0"),
    ],
)
def test_while_it_trains(
    tmp_path: Path, corpus: Path, start: Callable[..., Demo], stage: str, signals: list[str], pause: str
):
    """Ctrl-C pressed twice left ranks behind, and SIGKILL all of them: torchrun trained on."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/corpus").symlink_to(corpus)
    demo = start(tmp_path, PAUSE=pause)
    demo.wait_for(stage)
    numbers = [getattr(signal, name) for name in signals]
    code = demo.end(*numbers)
    if signals == ["SIGKILL"]:
        assert code == -9
    else:
        assert code == 128 + numbers[0], demo.said()
        assert demo.said().endswith("stopped; every rank has ended\n")
    assert "Traceback" not in demo.said()
