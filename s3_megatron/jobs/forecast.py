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

    def __init__(self, show: Callable[[str], None], starts: int, work: float) -> None:
        """``show`` gets the line to print; ``starts`` and ``work``, in iterations of training, are of all runs."""
        self._show = show
        self._starts, self._work = starts, work
        self._began = self._started = time.monotonic()
        self._start_seconds = 0.0
        self._first: float | None = None  # when the first run had done its first iteration
        self._done = 0
        self._shown: float | None = None

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
        if self._shown is None:
            self._show(f"about {rounded(total)} in all on this machine: {each:.2f} s an iteration")
            self._shown = total
        elif abs(total - self._shown) > MISLEADING * self._shown:
            self._show(f"corrected: about {rounded(total)} in all, {each:.2f} s an iteration")


def work(schedule: Schedule) -> float:
    """Give what a run is in iterations of training; it is validated every so often and at its end."""
    validations = -(-schedule.train_iters // schedule.eval_interval)
    return schedule.train_iters + VALIDATION * schedule.eval_iters * validations


def rounded(seconds: float) -> str:
    """Write a duration, rounded, in seconds or minutes."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{seconds / 60:.0f} minutes"
