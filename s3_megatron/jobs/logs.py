"""A run's logs as one stream."""

import time
from collections.abc import Iterator
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.jobs.runs import Run

_LONGEST_LINE = 2**20  # bytes


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


def _added(path: Path, offsets: dict[Path, int], follow: bool) -> Iterator[str]:
    """Read what was added to ``path`` since ``offsets``, which it keeps; with ``follow`` whole lines only.

    Line by line, and a longer one in parts: a log has gigabytes.
    """
    with path.open("rb") as file:
        file.seek(offsets.get(path, 0))
        while text := file.readline(_LONGEST_LINE):
            if follow and not text.endswith(b"\n") and len(text) < _LONGEST_LINE:
                return
            offsets[path] = file.tell()
            yield from text.decode(errors="replace").splitlines()
