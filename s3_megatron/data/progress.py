"""The bar that `prepare` moves."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from s3_megatron.data.prepare import Progress


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar with documents/s, MB/s of text and time left; gives what ``prepare(on_progress=...)`` takes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rates]}"),
    )
    # A log file gets no bar: all it would show is an empty line.
    quiet = not console.is_terminal
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("getting ready", total=None, rates="")
        first: tuple[float, Progress] | None = None

        def advance(now: Progress) -> None:
            nonlocal first
            # Rates count from the first batch on: before it lie imports and the start of the workers.
            first = first or (time.monotonic(), now)
            seconds = time.monotonic() - first[0]
            rates = f"{now.documents:,} documents"
            if seconds > 0.5:
                documents = (now.documents - first[1].documents) / seconds
                megabytes = (now.text_bytes - first[1].text_bytes) / seconds / 1e6
                rates += f", {documents:,.0f}/s, {megabytes:.1f} MB/s"
            bar.update(task, description="tokenizing", completed=now.read, total=now.total, rates=rates)

        yield advance
