"""The patches there are: our lines for one release of a host, and what its touched files are like."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATCHES = Path(__file__).parent / "patches"


@dataclass(frozen=True)
class Hunk:
    """Lines of ours, without line ends, that go behind line ``after`` of the release's file (1 is its first)."""

    after: int
    lines: tuple[bytes, ...]


@dataclass(frozen=True)
class TouchedFile:
    """A file of the release that gets lines of ours.

    Attributes:
        path: below the checkout or site-packages folder.
        before: sha256 of the release's bytes, with ``\\n`` for line ends.
        patched: sha256 of them with our lines.
        lines: ``line_hash`` of each of the release's lines.
    """

    path: str
    before: str
    patched: str
    lines: tuple[str, ...]
    hunks: tuple[Hunk, ...]

    def anchor(self, hunk: Hunk) -> tuple[str, ...]:
        """Give the hashes of the lines in front of ``hunk``: as few as are there once in the release."""
        tails = (self.lines[start : hunk.after] for start in reversed(range(hunk.after)))
        return next(tail for tail in tails if len(places(self.lines, tail)) == 1)


@dataclass(frozen=True)
class Release:
    """One version of a host that there is a patch for.

    Attributes:
        symbols: for each of the host's symbols that S3 goes through, and this version has: ``file``, and hashes of
            its ``signature`` and ``body``.
    """

    host: str
    version: str
    files: tuple[TouchedFile, ...]
    symbols: dict[str, dict[str, str]]


def places(lines: tuple[Any, ...], wanted: tuple[Any, ...]) -> list[int]:
    """List where ``wanted`` starts in ``lines``."""
    return [i for i in range(len(lines) - len(wanted) + 1) if lines[i : i + len(wanted)] == wanted]


def line_hash(line: bytes) -> str:
    """Shorten a line, which may have its end, to eight hexadecimal digits."""
    return hashlib.sha256(line.rstrip(b"\r\n")).hexdigest()[:8]


def file_hash(data: bytes) -> str:
    """Hash a file as it is without git's autocrlf."""
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()


def versions(host: str) -> list[str]:
    """List the versions of ``host`` ("megatron-lm" or "deepspeed") that there are patches for, oldest first."""
    return sorted((path.stem for path in (PATCHES / host).glob("*.json")), key=_numbers)


def nearest(host: str, version: str) -> str:
    """Give the version with a patch that is of ``version``'s minor version, or the newest older one, or the oldest."""
    known = versions(host)
    older = [each for each in known if _numbers(each) <= _numbers(version)]
    return [*known[:1], *older, *(each for each in known if same_minor(each, version))][-1]


def same_minor(one: str, other: str) -> bool:
    """Whether two versions differ in their last number at most, as 0.19.1 and 0.19.2 do."""
    return _numbers(one)[:2] == _numbers(other)[:2]


def load(host: str, version: str) -> Release:
    """Read the patch for one of ``versions(host)``."""
    record = json.loads((PATCHES / host / f"{version}.json").read_text(encoding="utf-8"))
    patch = (PATCHES / host / f"{version}.patch").read_text(encoding="utf-8")
    return Release(host, version, touched_files(record, patch), record["symbols"])


def touched_files(record: dict[str, Any], patch: str) -> tuple[TouchedFile, ...]:
    """Put together what a record and its patch say of each file."""
    hunks = read_hunks(patch)
    return tuple(
        TouchedFile(path, entry["before"], entry["patched"], tuple(entry["lines"].split()), hunks[path])
        for path, entry in record["files"].items()
    )


def read_hunks(patch: str) -> dict[str, tuple[Hunk, ...]]:
    """Read a patch without context, which only adds lines: the hunks of each file, in their order."""
    found: dict[str, tuple[Hunk, ...]] = {}
    for path, body in re.findall(r"^\+\+\+ b/(.*)\n((?:[@+].*\n)+)", patch, re.MULTILINE):
        found[path] = tuple(
            Hunk(int(after), tuple(line[1:].encode() for line in added.splitlines()))
            for after, added in re.findall(r"^@@ -(\d+),0 .*\n((?:\+.*\n)+)", body, re.MULTILINE)
        )
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def our_lines(file: TouchedFile) -> Iterator[bytes]:
    """Yield the lines that we add to ``file``."""
    for hunk in file.hunks:
        yield from hunk.lines
