"""A run's logs as one stream."""

import time
from collections.abc import Iterator
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.jobs.runs import Run


def lines(run: Run, follow: bool) -> Iterator[str]:
    """Yield the lines of every file in the run's ``logs``, behind the file's name: job, or a node's.

    Without ``follow`` one file comes after the other; with it, then what is added to any, until Ctrl-C.

    Raises:
        S3Error: there is no log yet, and ``follow`` does not wait for one.
    """
    if not follow and not list(run.logs.glob("*.log")):
        raise S3Error(f"{run.path.name} has written no log yet: s3-megatron status {run.label}, or logs -f to wait")
    offsets: dict[Path, int] = {}
    while True:
        for path in sorted(run.logs.glob("*.log")):
            yield from (f"{path.stem}: {line}" for line in _added(path, offsets, follow))
        if not follow:
            return
        time.sleep(0.5)


def _added(path: Path, offsets: dict[Path, int], follow: bool) -> list[str]:
    """Read what was added to ``path`` since ``offsets``; with ``follow`` whole lines only."""
    with path.open("rb") as file:
        file.seek(offsets.get(path, 0))
        text = file.read()
    if follow:
        text = text[: text.rfind(b"\n") + 1]
    offsets[path] = offsets.get(path, 0) + len(text)
    return text.decode(errors="replace").splitlines()
