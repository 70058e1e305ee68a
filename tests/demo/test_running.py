"""The demonstration from outside: what it prints and where, and that nothing of it is left however it is ended."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from s3_megatron.jobs.runs import known_runs
from s3_megatron.jobs.status import status
from tests.launcher import ROOT
from tests.terminal import lives

pytestmark = pytest.mark.slow

SECONDS = 200  # for what takes five on a machine that has nothing else to do


class Demo:
    """A running demonstration, with ranks that only log, started as a background job of a shell would be."""

    def __init__(self, folder: Path, stdout: int | None = None, ignored: str = "INT", **env: str) -> None:
        self.output, self.state = folder / "output", folder / "state"
        settings = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "XDG_STATE_HOME": str(self.state), **env}
        # What sh does for `make demo &`: SIGINT is ignored, and Python then installs no handler of its own.
        command = ["sh", "-c", f'trap "" {ignored}; exec "$@"', "-", sys.executable, "-m", "tests.demo.stand_in"]
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **settings},
                stdout=file if stdout is None else stdout,
                stderr=file,
                # Under `nohup make test` it is ignored, which a shell cannot change.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )

    def printed(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until ``text`` is printed, and a little into what it announces."""
        end = time.monotonic() + SECONDS
        while text not in self.printed():
            assert self.process.poll() is None and time.monotonic() < end, self.printed()
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

    def states(self) -> list[str]:
        """What ``s3-megatron status`` shows of each of its runs."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(self.state))
            return [f"{run.path.name}: {status(run).state}" for run in known_runs()]

    def family(self) -> list[psutil.Process]:
        """All processes below it."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Demo]]:
    """Start a Demo; what a failed test leaves of it is killed."""
    started: list[Demo] = []

    def start(*args: Any, **kwargs: Any) -> Demo:
        started.append(Demo(*args, **kwargs))
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
    """SentencePiece's C++ kept Ctrl-C waiting for as long as it took.

    torch is real: on a busy machine the signal may come only when the text is being encoded.
    """
    demo = start(tmp_path, PAUSE="1", TORCH="1")
    demo.wait_for(stage)
    number = getattr(signal, how)
    assert demo.end(number) == (-9 if how == "SIGKILL" else 128 + number), demo.printed()


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
    """Ctrl-C pressed twice left ranks behind, and SIGKILL all of them: torchrun trained on.

    The last run is one that can be resumed, and `status` shows it as such.
    """
    # On a busy machine what follows the stage was over before the signal came.
    demo = start(with_corpus(tmp_path / "t", corpus), PAUSE=pause, HOLD="adamw" if "killed" in stage else "")
    demo.wait_for(stage)
    numbers = [getattr(signal, name) for name in signals]
    code = demo.end(*numbers)
    if signals == ["SIGKILL"]:
        assert code == -9
    else:
        assert code == 128 + numbers[0], demo.printed()
        assert demo.printed().endswith("stopped; every rank has ended\n")
    assert "Traceback" not in demo.printed()
    if "iteration" in stage:
        assert demo.states() == ["s3: stopped (stopped): s3-megatron resume s3"]


def with_corpus(folder: Path, corpus: Path) -> Path:
    (folder / "runs").mkdir(parents=True)
    (folder / "runs/corpus").symlink_to(corpus)
    return folder


def test_a_log_of_the_whole(tmp_path: Path, corpus: Path, start: Callable[..., Demo]):
    """Where spaces and umlauts are in the path, and where an earlier one was interrupted; it survives its terminal."""
    folder = with_corpus(tmp_path / "größere Läufe", corpus)
    (folder / "runs/demo/s3/watch").mkdir(parents=True)
    (folder / "runs/demo/s3/watch/metrics.jsonl").write_text('{"event": "train", "iter')
    demo = start(folder, ignored="INT HUP", PAUSE="0.02")  # as under nohup
    demo.wait_for("S3: iteration 1 ")
    demo.process.send_signal(signal.SIGHUP)
    assert demo.process.wait(SECONDS) == 0, demo.printed()
    printed = demo.printed()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", printed)
    assert "the last demonstration is now in runs/demo.previous\n" in printed
    assert (
        len(re.findall(r"^about \d+ (seconds|minutes) in all on this machine: 0\.\d\d s an iteration$", printed, re.M))
        == 1
    )
    assert re.search(
        r"SIGKILL to rank 1 at iteration [89]\d\n.*\n.*\n.*resumed from the checkpoint of iteration 64\n", printed
    )
    found = json.loads((folder / "runs/demo/report.json").read_text())
    assert (found["resume"]["resumed_from"], found["resume"]["loss_gap"]) == (64, 0)
    assert (folder / "runs/demo/report.png").stat().st_size > 10_000
    assert demo.states() == ["s3: finished", "s3-killed: finished", "adamw: finished"]


def test_a_narrow_terminal(tmp_path: Path, corpus: Path, start: Callable[..., Demo]):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    demo = start(with_corpus(tmp_path / "t", corpus), theirs, PAUSE="0.02", TERM="xterm", COLUMNS="40")
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # EIO: the other end is closed
        while part := os.read(ours, 1 << 16):
            seen += part
    os.close(ours)
    assert demo.process.wait(SECONDS) == 0, seen.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    bars = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("S3 ") and "%" in line]
    assert bars and max(map(len, bars)) <= 40
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l"), "the cursor is shown again"


def test_a_reader_that_goes_away(tmp_path: Path, corpus: Path, start: Callable[..., Demo]):
    """``make demo | head -3``."""
    ours, theirs = os.pipe()
    demo = start(with_corpus(tmp_path / "t", corpus), theirs, PAUSE="0.02")
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        while "starting ranks" not in pipe.readline():
            pass
        family = demo.family()
    assert demo.process.wait(SECONDS) == 1
    assert "Traceback" not in demo.printed() and not any(map(lives, family))
