"""The metrics file of a run: who writes it, who reads it whole, and who follows it. Imports no torch.

One event a line (``events``), appended; a resumed run goes on in the same file.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from s3_megatron.errors import S3Error
from s3_megatron.files import append_line
from s3_megatron.watch.events import Evaluation, Event, Optimizer, Train, decode, encode

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"

# No event is longer: what is, is passed over without being held in memory.
_LONGEST_LINE = 2**20
_BLOCK = 2**16


class Writer:
    """Appends events to ``directory/metrics.jsonl``."""

    def __init__(self, directory: Path) -> None:
        """Create ``directory`` where it is missing; the file itself comes with the first event.

        A job's watchdog takes a new or longer file for a sign of life, so nothing is written before there is one.

        Raises:
            S3Error: nothing can be written there.
        """
        self._path = directory / FILE_NAME
        self._failure: str | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
            if self._path.exists():
                self._path.open("ab").close()
        except OSError as error:
            raise S3Error(
                f"metrics cannot be written to {self._path}: {error.strerror or error}; name a folder that can be "
                "written (--watch-dir), or none"
            ) from error

    def write(self, event: Event) -> None:
        """Append one line; a failure, as of a full disk, is logged and costs the line, not the run."""
        try:
            append_line(self._path, encode(event).encode())
            self._failure = None
        except OSError as error:
            if self._failure != str(error):
                logger.warning("a line of metrics is lost, and more may be: %s: %s", self._path, error.strerror)
                self._failure = str(error)
            with suppress(OSError):  # the run goes on: its watchdog must not take a full disk for a hang
                os.utime(self._path)


@dataclass
class Metrics:
    """A run as its file has it; train, validation and test are keyed by iteration."""

    optimizer: Optimizer | None = None
    train: dict[int, Train] = field(default_factory=dict)
    validation: dict[int, Evaluation] = field(default_factory=dict)
    test: dict[int, Evaluation] = field(default_factory=dict)


def read_metrics(directory: Path) -> Metrics:
    """Read ``directory/metrics.jsonl``; of an iteration done twice (a resumed run) the last counts.

    What it had done beyond where it was resumed from is given up, done again so far or not. A line that is torn, or of
    a kind that is not known here, is passed over. A missing file reads as an empty run.

    Raises:
        S3Error: the file is there and cannot be read.
    """
    metrics, has_begun = Metrics(), False
    for event in Tail(directory, from_start=True).events(unfinished=True):
        match event:
            case Optimizer():
                metrics.optimizer, has_begun = event, True
            case Train():
                for events in (metrics.train, metrics.validation, metrics.test) if has_begun else ():
                    for later in [each for each in events if each > event.iteration]:
                        del events[later]
                has_begun = False
                metrics.train[event.iteration] = event
            case Evaluation():
                getattr(metrics, event.kind)[event.iteration] = event
    return metrics


class Tail:
    """Reads the events that a run appends to its metrics file."""

    def __init__(self, directory: Path, *, from_start: bool = False) -> None:
        """Start at the present end of ``directory``'s file, which need not exist yet, or at its start."""
        self._path = directory / FILE_NAME
        self._offset = 0
        with suppress(OSError):
            self._offset = 0 if from_start else self._path.stat().st_size

    def events(self, *, unfinished: bool = False) -> Iterator[Event]:
        """Yield the events of the lines written since the last call; the last one without its end if asked.

        A file that has become shorter is another one, and is read from its start.

        Raises:
            S3Error: the file is there and cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                for line in _lines(file):
                    if line.endswith(b"\n"):
                        self._offset = file.tell()
                    elif not unfinished:
                        return
                    if (event := decode(line)) is not None:
                        yield event
        except FileNotFoundError:
            return
        except OSError as error:
            raise S3Error(f"{self._path} cannot be read: {error.strerror or error}") from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines from where ``file`` stands; of one that is too long for an event, its last part."""
    while line := file.readline(_LONGEST_LINE):
        if line.endswith(b"\n") or len(line) < _LONGEST_LINE:
            yield line


def newest_train(directory: Path, count: int) -> list[Train]:
    """Read the last ``count`` events of training, the newest last, from the end of the file: it may be long.

    Raises:
        S3Error: the file is there and cannot be read.
    """
    found: list[Train] = []
    path = directory / FILE_NAME
    try:
        with path.open("rb") as file:
            for line in _lines_backwards(file):
                if isinstance(event := decode(line), Train):
                    found.append(event)
                    if len(found) == count:
                        break
    except FileNotFoundError:
        pass
    except OSError as error:
        raise S3Error(f"{path} cannot be read: {error.strerror or error}") from error
    return found[::-1]


def _lines_backwards(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of ``file``, the last first; one that is too long for an event comes in parts."""
    begin, rest = file.seek(0, os.SEEK_END), b""
    while begin:
        end, begin = begin, max(0, begin - _BLOCK)
        file.seek(begin)
        rest, *whole = (file.read(end - begin) + rest).split(b"\n")
        yield from reversed(whole)
        if len(rest) > _LONGEST_LINE:
            rest = b""
    yield rest
