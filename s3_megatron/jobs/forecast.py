"""How long a few training runs take in all: printed once they have begun, and corrected at most once."""

import time
from collections.abc import Callable

from s3_megatron.jobs.recipe import Schedule
from s3_megatron.watch.events import Event, Train

# Iterations after the first that are enough for an estimate, and for one to correct it by.
FIRST, SECOND = 6, 40
# An estimate that is wrong by less than this share of itself is left alone.
MISLEADING = 0.25
# What an iteration of validation, which only goes forward, takes of one of training.
VALIDATION = 0.3


class Forecast:
    """Counts from its making, and sees the runs from outside: when one is started, and what it logs."""

    def __init__(self, say: Callable[[str], None], starts: int, work: float) -> None:
        """``say`` gets the line to show; ``starts`` and ``work``, in iterations of training, are of all runs."""
        self._print = say
        self._starts, self._work = starts, work
        self._began = self._started = time.monotonic()
        self._start_seconds = 0.0
        self._first: float | None = None  # when the first run had done its first iteration
        self._done = 0
        self._said: float | None = None

    def started(self) -> None:
        """Ranks are being started, from here or by the script that is."""
        self._started = time.monotonic()
        self._starts -= 1

    def event(self, event: Event) -> None:
        """See a line of a metrics file."""
        if not isinstance(event, Train) or self._done == SECOND:
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._start_seconds = now, now - self._started
            return
        self._done += 1
        if self._done not in (FIRST, SECOND):
            return
        each = (now - self._first) / self._done
        total = self._first - self._began + self._starts * self._start_seconds + self._work * each
        if self._said is None:
            self._print(f"about {spoken(total)} in all on this machine: {each:.2f} s an iteration")
            self._said = total
        elif abs(total - self._said) > MISLEADING * self._said:
            self._print(f"corrected: about {spoken(total)} in all, {each:.2f} s an iteration")


def work(schedule: Schedule) -> float:
    """Give what a run is in iterations of training; it is validated every so often and at its end."""
    validations = -(-schedule.train_iters // schedule.eval_interval)
    return schedule.train_iters + VALIDATION * schedule.eval_iters * validations


def spoken(seconds: float) -> str:
    """Say a duration as people do."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{seconds / 60:.0f} minutes"
