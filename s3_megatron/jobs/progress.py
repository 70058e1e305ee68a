"""What a person sees while training runs here: one line a run, or plain lines where there is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# How often a run says where it is when nobody watches a bar: iterations.
PLAIN_EVERY = 50


class RunLine:
    """The line of one training run."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        """Add the line to ``progress``."""
        self._progress = progress
        self._title = title
        self._task: TaskID = progress.add_task(title, total=total, figures="", status="")
        self._rate = 0.0

    def status(self, word: str) -> None:
        """Say in a word what is happening now."""
        self._progress.update(self._task, status=word)
        if not self._progress.console.is_terminal:
            self.note(word)

    def note(self, text: str) -> None:
        """Say what has happened, on a line of its own that stays."""
        self._progress.console.print(f"{self._title}: {text}")

    def event(self, event: dict[str, Any]) -> None:
        """Show a line of the metrics file."""
        if event["event"] != "train":
            return
        if event["seconds"]:
            # Smoothed over about ten iterations: single ones include checkpoints and validation.
            self._rate += 0.1 * (1 / event["seconds"] - self._rate) if self._rate else 1 / event["seconds"]
        figures = f"loss {event['lm_loss']:.3f} {self._rate:4.1f} it/s"
        self._progress.update(self._task, completed=event["iteration"], figures=figures, status="training")
        if not self._progress.console.is_terminal and event["iteration"] % PLAIN_EVERY == 0:
            self.note(f"iteration {event['iteration']}, {figures}")


@contextmanager
def run_line(console: Console, title: str, total: int) -> Iterator[RunLine]:
    """Show the line of a run of ``total`` iterations while the block runs, and leave it standing afterwards."""
    columns = [
        TextColumn("{task.description:<19}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[status]}"),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield RunLine(progress, title, total)
