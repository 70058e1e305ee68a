"""Running steps, each within its own limit and in its own processes, so that none can stop the next."""

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

MARK = "S3_GPU_STEP"  # in the environment of everything that a step starts, in whatever session
NUMBERS = "S3_GPU_NUMBERS"  # the file into which a step writes its figures, as JSON
_GRACE_SECONDS = 5.0

PASSED, FAILED, LATE, SKIPPED = "passed", "failed", "over its limit", "skipped"


@dataclass(frozen=True)
class Step:
    """One program. Steps of one ``stage`` run side by side, stages one after the other, in order of worth.

    ``limit`` is in seconds. Without one of ``modules``, ``programs``, ``gib`` of the GPU's memory, or, with ``gpu``,
    without a GPU that can run it, the step is skipped.
    """

    name: str
    stage: int
    limit: float
    command: Sequence[str]
    modules: Sequence[str] = ()
    programs: Sequence[str] = ()
    gib: float = 0.0
    gpu: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended; ``reason`` says why it did not pass."""

    step: Step
    state: str
    seconds: float = 0.0
    reason: str = ""


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    mark: str
    started: float
    end: float


def run(
    steps: Sequence[Step],
    folder: Path,
    environment: Mapping[str, str],
    deadline: float,
    obstacle: Callable[[Step], str | None],
    say: Callable[[Outcome], None],
) -> list[Outcome]:
    """Run all steps before ``deadline`` (of time.monotonic); logs and figures are in ``folder``, by the steps' names.

    ``obstacle`` says just before a step why it cannot run here, and ``say`` gets every outcome at once. Whatever ends
    this function, no process of a step outlives it.
    """
    outcomes: list[Outcome] = []
    for stage in sorted({step.stage for step in steps}):
        running: list[_Running] = []
        try:
            for step in (step for step in steps if step.stage == stage):
                left = deadline - time.monotonic()
                reason = obstacle(step) if left > _GRACE_SECONDS else "no time is left"
                if reason is not None:
                    outcomes.append(Outcome(step, SKIPPED, reason=reason))
                    say(outcomes[-1])
                else:
                    running.append(_start(step, folder, environment, min(step.limit, left - _GRACE_SECONDS)))
            while running:
                time.sleep(0.05)
                for one in [one for one in running if _is_over(one)]:
                    running.remove(one)
                    outcomes.append(_finish(one, folder))
                    say(outcomes[-1])
        finally:
            for one in running:
                _end(one)
    return outcomes


def _start(step: Step, folder: Path, environment: Mapping[str, str], limit: float) -> _Running:
    mark = f"{step.name}-{uuid.uuid4().hex}"
    own = {**environment, **step.environment, MARK: mark, NUMBERS: str(folder / f"{step.name}.json")}
    with (folder / f"{step.name}.log").open("wb") as log:
        log.write(f"$ {' '.join(step.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            list(step.command), env=own, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    now = time.monotonic()
    return _Running(step, process, mark, now, now + limit)


def _is_over(one: _Running) -> bool:
    return one.process.poll() is not None or time.monotonic() >= one.end


def _finish(one: _Running, folder: Path) -> Outcome:
    code, seconds = one.process.poll(), time.monotonic() - one.started
    _end(one)
    if code is None:
        return Outcome(one.step, LATE, seconds, f"stopped after {seconds:.0f} s")
    if code == 0:
        return Outcome(one.step, PASSED, seconds)
    return Outcome(one.step, FAILED, seconds, f"exit code {code}: {last_line(folder / f'{one.step.name}.log')}")


def write_numbers(figures: Any) -> None:
    """Write a step's figures, as JSON, where ``run`` has asked for them; a program that nobody watches writes none."""
    if path := os.environ.get(NUMBERS):
        Path(path).write_text(json.dumps(figures), encoding="utf-8")


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:200]


def _end(one: _Running) -> None:
    """End what is left of a step; torchrun gives every rank a session, so it is the environment that tells."""
    left = [process for process in psutil.process_iter() if _belongs(process, one.mark)]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(left, timeout=_GRACE_SECONDS / 2)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        one.process.wait(_GRACE_SECONDS / 2)


def _belongs(process: psutil.Process, mark: str) -> bool:
    if process.pid == os.getpid():
        return False
    try:
        return bool(process.environ().get(MARK) == mark)
    except (psutil.Error, OSError):
        return False
