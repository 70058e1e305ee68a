"""What a person sees while this machine works: a bar a stage, or a line now and then where there is no terminal."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from s3_megatron.watch.events import Event, Train

# Seconds between two plain lines of a stage, and the share of its time so far: a log of ten minutes has a screen of
# them, and one of a night some three hundred.
PLAIN_SECONDS, PLAIN_SHARE = 15.0, 1 / 60
# Columns that a terminal needs for everything; a narrower one is spared the bar, the figures and what happens now.
WIDE = 80


class StageLine:
    """The line of one stage."""

    _printed = -math.inf  # when the last plain line was printed

    def __init__(self, progress: Progress, title: str, total: float | None) -> None:
        """Add the line to ``progress``; ``total`` is None where the end cannot be known."""
        self._progress = progress
        self._title = title
        self._total = total
        self._task = progress.add_task(title, total=total, figures="", status="")
        self._plain = progress.disable
        self._first: tuple[float, float] | None = None

    def status(self, what: str) -> None:
        """Show what is happening now, in a few words."""
        self._progress.update(self._task, status=what)
        if self._plain:
            self.note(what)

    def note(self, text: str) -> None:
        """Print what has happened, on a line of its own that stays."""
        print_line(self._progress.console, f"{self._title}: {text}")

    def advance(self, done: float, figures: str = "") -> None:
        """Show that ``done`` of the total is done."""
        self._progress.update(self._task, completed=done, figures=figures)
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = now, done
        if self._plain and now - self._printed >= max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._first[0])):
            self._printed = now
            self.note(", ".join(filter(None, (self._share(done), figures, self._left(now, done)))))

    def _share(self, done: float) -> str:
        return f"{done / self._total:.0%}" if self._total else ""

    def _left(self, now: float, done: float) -> str:
        assert self._first is not None
        since, before = self._first
        if not self._total or done <= before:
            return ""
        minutes, seconds = divmod(round((self._total - done) * (now - since) / (done - before)), 60)
        return f"{minutes}:{seconds:02} left" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min left"


class RunLine(StageLine):
    """The line of one training run, whose total are its iterations."""

    _rate = 0.0

    def event(self, event: Event) -> None:
        """Show a line of the metrics file."""
        if not isinstance(event, Train):
            return
        if event.seconds:
            # Smoothed over about ten iterations: single ones include checkpoints and validation.
            self._rate += 0.1 * (event.seconds - self._rate) if self._rate else event.seconds
        self._progress.update(self._task, status="training")
        figures = f"loss {event.losses.get('lm_loss', math.nan):.3f}"
        if self._rate:  # a run's first iteration has no time
            figures += f", {self._rate:.2f} s/iteration"
        self.advance(event.iteration, figures)

    def _share(self, done: float) -> str:
        return f"iteration {done:.0f} of {self._total:.0f}"


def print_line(console: Console, text: str) -> None:
    """Print ``text`` as it is, on one line of a log and above the bars of a terminal."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def is_live(console: Console) -> bool:
    """Whether bars can be drawn: on a terminal that moves its cursor; FORCE_COLOR does not make one of a CI's log."""
    return console.is_interactive and console.file.isatty()


@contextmanager
def stage_line(console: Console, title: str, total: float | None) -> Iterator[StageLine]:
    """Show the line of a stage while the block runs, and leave it standing afterwards."""
    with _progress(console) as progress:
        line = StageLine(progress, title, total)
        line._printed = time.monotonic()  # most are done before there is anything to print
        yield line
        progress.update(line._task, total=total or 1, completed=total or 1, status="done")


@contextmanager
def share_line(console: Console, title: str, total: float) -> Iterator[StageLine]:
    """Show the line of work that need not be whole when the block ends, and leave it standing afterwards."""
    with _progress(console) as progress:
        yield StageLine(progress, title, total)


@contextmanager
def run_line(console: Console, title: str, total: int) -> Iterator[RunLine]:
    """Show the line of a run of ``total`` iterations while the block runs, and leave it standing afterwards."""
    with _progress(console) as progress:
        yield RunLine(progress, title, total)


def _progress(console: Console) -> Progress:
    title = TextColumn("{task.description:<19}", markup=False)
    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    columns: list[ProgressColumn] = [title, TaskProgressColumn(), left]
    if console.width >= WIDE:
        about = TextColumn("{task.fields[figures]}", markup=False), TextColumn("[dim]{task.fields[status]}")
        columns = [title, BarColumn(bar_width=10), *columns[1:], *about]
    return Progress(*columns, console=console, disable=not is_live(console))
