"""Running steps, each within its own limit and in its own processes, so that none can stop the next."""

import contextlib
import json
import math
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
    seconds: float  # that it may take: its limit, or what is left

    def is_over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() >= self.started + self.seconds


def run(
    steps: Sequence[Step],
    folder: Path,
    environment: Mapping[str, str],
    deadline: float,
    obstacle: Callable[[Step], str | None],
    show: Callable[[list[Outcome]], None],
    gib: float = math.inf,
) -> list[Outcome]:
    """Run all steps before ``deadline`` (of time.monotonic); logs and figures are in ``folder``, by the steps' names.

    ``obstacle`` says just before a step why it cannot run here, and ``show`` gets outcomes as they come. Steps that run
    side by side do not need more than ``gib`` of the GPU's memory together. Whatever ends this function, no process of
    a step outlives it, but for one that the kernel does not let be killed.
    """
    outcomes: list[Outcome] = []

    def add(*ended: Outcome) -> None:
        outcomes.extend(ended)
        if ended:
            show(list(ended))

    for stage in sorted({step.stage for step in steps}):
        waiting, running = [step for step in steps if step.stage == stage], list[_Running]()
        # Made before the processes: a signal may end this function inside of Popen, when no process is known yet.
        marks = {step.name: f"{step.name}-{uuid.uuid4().hex}" for step in waiting}
        try:
            while waiting or running:
                for step in list(waiting):
                    if running and step.gib + sum(one.step.gib for one in running) > gib:
                        continue  # until there is room beside the others
                    waiting.remove(step)
                    left = deadline - time.monotonic() - _GRACE_SECONDS
                    reason = obstacle(step) if left > 0 else "no time is left"
                    if reason is None:
                        running.append(_start(step, marks[step.name], folder, environment, left))
                    else:
                        add(Outcome(step, SKIPPED, reason=reason))
                time.sleep(0.05)
                over = [one for one in running if one.is_over()]
                running = [one for one in running if one not in over]
                add(*_finish(over, folder))
        finally:
            _end(set(marks.values()))
            for one in running:
                one.process.poll()
    return outcomes


def _start(step: Step, mark: str, folder: Path, environment: Mapping[str, str], left: float) -> _Running:
    own = {**environment, **step.environment, MARK: mark, NUMBERS: str(folder / f"{step.name}.json")}
    with (folder / f"{step.name}.log").open("wb") as log:
        log.write(f"$ {' '.join(step.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            list(step.command), env=own, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    return _Running(step, process, mark, time.monotonic(), min(step.limit, left))


def _finish(over: Sequence[_Running], folder: Path) -> list[Outcome]:
    """End these steps, all at once: one after the other they would take several times the grace."""
    if not over:
        return []
    codes = [one.process.poll() for one in over]
    taken = [time.monotonic() - one.started for one in over]
    _end({one.mark for one in over})
    for one in over:
        one.process.poll()
    return [_outcome(one, code, seconds, folder) for one, code, seconds in zip(over, codes, taken, strict=True)]


def _outcome(one: _Running, code: int | None, seconds: float, folder: Path) -> Outcome:
    if code is None:
        why = "its limit" if one.seconds == one.step.limit else "when the time was up"
        return Outcome(one.step, LATE, seconds, f"stopped after {seconds:.0f} s, {why}")
    if code == 0:
        return Outcome(one.step, PASSED, seconds)
    return Outcome(one.step, FAILED, seconds, f"exit code {code}: {last_line(folder / f'{one.step.name}.log')}")


def write_numbers(figures: Any) -> None:
    """Write a step's figures, as JSON, where ``run`` has asked for them; a program started by hand writes none."""
    if path := os.environ.get(NUMBERS):
        Path(path).write_text(json.dumps(figures), encoding="utf-8")


def last_line(log: Path) -> str:
    """The last line of a log that has something in it."""
    lines = [line.strip() for line in end_of(log, 2**16).decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:200]


def end_of(path: Path, most: int) -> bytes:
    """The last ``most`` bytes of a file that may be larger than the memory: a step may print for as long as it runs."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read(most)


def _end(marks: set[str]) -> None:
    """End what is left of steps; torchrun gives every rank a session, so it is the environment that names the step."""
    left = _marked(marks)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    psutil.wait_procs(left, timeout=_GRACE_SECONDS / 2)
    # More than once: one that ignores SIGTERM may have forked since it was listed. Not for ever: one may wait for the
    # driver in the kernel.
    end = time.monotonic() + _GRACE_SECONDS / 4
    while (left := _marked(marks)) and time.monotonic() < end:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=max(0.0, end - time.monotonic()))


def _marked(marks: set[str]) -> list[psutil.Process]:
    """Those that live and have one of the marks; looked for twice, as a process in its exec has none."""
    for _ in range(2):
        if found := [process for process in psutil.process_iter() if _mark(process) in marks]:
            return found
        time.sleep(0.02)
    return []


def _mark(process: psutil.Process) -> str | None:
    if process.pid == os.getpid():
        return None
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None
