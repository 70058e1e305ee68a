"""Which files are taken as text, by one rule for a file, a folder and a glob, and why the others are not."""

import errno
import glob
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from s3_megatron.data.sources import COMPRESSIONS, KINDS, first_record, kind_of, shown, uncompressed
from s3_megatron.errors import S3Error

READABLE = f"{', '.join(KINDS)}, and each of them with {', '.join(COMPRESSIONS)}"

_OTHERS = {
    ".parquet": "Parquet: write its text to .jsonl first",
    ".arrow": "Arrow: write its text to .jsonl first",
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z"), "an archive of files: unpack it first"),
}


@dataclass
class Inputs:
    """The files taken, each once and in the order they are read, and those passed over, with the reason."""

    taken: list[Path] = field(default_factory=list)
    passed: list[tuple[Path, str]] = field(default_factory=list)


def find_inputs(inputs: Iterable[str | Path]) -> Inputs:
    """Look through files, folders (in depth, links followed) and globs; a file is taken once.

    The order is the one given, and by name within a folder or a glob, so that two runs write the same bytes.
    Hidden names count only where they are given. Raises S3Error for a name that leads to no file or to nothing
    that is taken, and for a file or folder that may not be read.
    """
    found = Inputs()
    seen: dict[tuple[int, int], Path] = {}
    for name in map(str, inputs):
        before = len(found.passed)
        new = False
        for path in _files(name, found):
            try:
                reason, identity = _reason(path)
            except OSError as error:
                raise S3Error(f"input {shown(path)} cannot be read: {error.strerror or error}") from error
            # One file by two names is a slip; its text twice in the data would go unseen.
            if not reason and seen.setdefault(identity, path) is not path:
                new = True
                if seen[identity] != path:
                    found.passed.append((path, "another name of a file that is taken"))
            elif reason:
                found.passed.append((path, reason))
            else:
                new = True
                found.taken.append(path)
        if not new:
            raise S3Error(f"input {shown(name)}: {_nothing(found.passed[before:])}; readable are {READABLE}")
    return found


def _nothing(passed: list[tuple[Path, str]]) -> str:
    if not passed:
        return "no such file, and no files in it"
    path, reason = passed[0]
    more = f", and {len(passed) - 1} more passed over" if len(passed) > 1 else ""
    return f"nothing to read ({shown(path)}: {reason}{more})"


def _files(name: str, found: Inputs) -> Iterator[Path]:
    matches = [name] if os.path.lexists(name) else glob.glob(name, recursive=True)
    # "**" goes forty times around a link that leads upwards: of one entry's paths the shortest counts.
    shortest: dict[str, Path] = {}
    for match in sorted(map(Path, matches), key=lambda path: len(path.parts)):
        shortest.setdefault(os.path.join(os.path.realpath(match.parent), match.name), match)
    searched = {os.path.realpath(match): match for match in shortest.values() if match.is_dir()}
    for match in sorted(shortest.values()):
        if match.is_dir():
            yield from _walk(match, found, searched)
        else:
            yield match


def _walk(folder: Path, found: Inputs, searched: dict[str, Path]) -> Iterator[Path]:
    """Files of a folder in depth, by name; folders that are ``searched`` by another path are not entered again."""
    files: list[Path] = []

    def refuse(error: OSError) -> None:
        raise S3Error(f"input {shown(error.filename)} cannot be read: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        for name in list(folders):
            path = Path(parent, name)
            if name.startswith("."):
                found.passed.append((path, "a hidden folder"))
                folders.remove(name)
            elif (first := searched.setdefault(os.path.realpath(path), path)) is not path:
                if first != path:
                    found.passed.append((path, "another name of a folder that is searched"))
                folders.remove(name)
        for name in names:
            path = Path(parent, name)
            if name.startswith("."):
                found.passed.append((path, "hidden"))
            else:
                files.append(path)
    yield from sorted(files)


def _reason(path: Path) -> tuple[str | None, tuple[int, int]]:
    """Why a file is passed over (None: it is taken), and its device and inode."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return "a link to nothing", (0, 0)
        raise
    identity = status.st_dev, status.st_ino
    kind = kind_of(path)
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file", identity
    if kind is None:
        ending = Path(uncompressed(path.name)).suffix
        return _OTHERS.get(ending, f"{ending or 'no ending'}: unknown kind"), identity
    if not status.st_size:
        return "empty", identity
    if not os.access(path, os.R_OK):
        raise PermissionError(13, os.strerror(13), str(path))
    # .json is also what settings, and one record over many lines, are called.
    if kind == ".json" and not isinstance(first_record(path), dict):
        return "its first line is no JSON object: one a line is read", identity
    return None, identity
