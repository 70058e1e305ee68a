"""Our lines in one file: whether they are there, putting them in, taking them out; bytes in, bytes out."""

import ast
import difflib
import warnings
from collections.abc import Iterable
from enum import StrEnum

from s3_megatron.errors import S3Error
from s3_megatron.patch.release import Hunk, TouchedFile, file_hash, line_hash, our_lines, places


class State(StrEnum):
    """What a touched file, or all of them together, is like."""

    UNPATCHED = "unpatched"
    PATCHED = "patched"
    THREE_WAY = "patched three-way"
    CHANGED = "changed"


def state(file: TouchedFile, data: bytes) -> State:
    """Compare a file with the release's; CRLF line ends, as git's autocrlf makes them, are no difference."""
    digest = file_hash(data)
    if digest == file.before:
        return State.UNPATCHED
    if digest == file.patched:
        return State.PATCHED
    whole = all(places(_bare(data), hunk.lines) for hunk in file.hunks)
    once = len(_ours_in(file, data)) == len(list(our_lines(file)))
    return State.THREE_WAY if whole and once else State.CHANGED


def insert(file: TouchedFile, data: bytes) -> bytes:
    """Put our lines behind their anchors, with the line ends of these.

    Raises:
        S3Error: an anchor is missing or there twice, lines of an S3 patch are there, or the result is not Python with
            our lines outside of every function.
    """
    refuse_strays(file, data)
    for hunk in reversed(file.hunks):
        lines = data.splitlines(keepends=True)
        at = _behind_anchor(file, hunk, tuple(map(line_hash, lines)))
        before = lines[at - 1]
        end = before[len(before.rstrip(b"\r\n")) :]
        if end:
            ours = [line + end for line in hunk.lines]
        else:  # the file's last line, and ours stays without an end
            end = b"\r\n" if lines[0].endswith(b"\r\n") else b"\n"
            ours = [end + end.join(hunk.lines)]
        data = b"".join([*lines[:at], *ours, *lines[at:]])
    _check_runs(file, data)
    return data


def refuse_strays(file: TouchedFile, data: bytes) -> None:
    """Raise S3Error if a file that is CHANGED has lines of ours: not all of them, or more than once."""
    if found := _ours_in(file, data):
        raise S3Error(
            f"{file.path} holds lines of an S3 patch, but not as they were put in: {ranges(found)}; take them out by "
            "hand, or restore the release's file"
        )


def remove(file: TouchedFile, data: bytes) -> bytes:
    """Take exactly our lines out of a file that is patched, in whichever way."""
    for hunk in file.hunks:
        (at,) = places(_bare(data), hunk.lines)
        lines = data.splitlines(keepends=True)
        until = at + len(hunk.lines)
        if until == len(lines) and not lines[-1].endswith((b"\r", b"\n")):
            lines[at - 1] = lines[at - 1].rstrip(b"\r\n")  # insert() gave it its end
        data = b"".join(lines[:at] + lines[until:])
    return data


def differences(file: TouchedFile, data: bytes) -> str:
    """Name the lines of a file that the release has not, and where lines of the release are missing."""
    lines = tuple(map(line_hash, data.splitlines()))
    compared = difflib.SequenceMatcher(None, file.lines, lines, autojunk=False).get_opcodes()
    theirs = [number for kind, _, _, start, end in compared if kind != "equal" for number in range(start + 1, end + 1)]
    gone = [number for kind, start, end, _, _ in compared if kind == "delete" for number in range(start + 1, end + 1)]
    parts = []
    if theirs:
        parts.append(ranges(theirs))
    if gone:
        parts.append(f"without {ranges(gone)} of the release")
    return ", ".join(parts) or "line ends at the end of the file"


def ranges(numbers: Iterable[int]) -> str:
    """Write line numbers as people do: "line 3", "lines 3-5, 9"."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and groups[-1][1] == number - 1:
            groups[-1][1] = number
        else:
            groups.append([number, number])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in groups)
    return f"line{'' if words.isdecimal() else 's'} {words}"


def parse(data: bytes) -> ast.Module:
    """Parse Python, without warnings of the escapes in it."""
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(data)


def _bare(data: bytes) -> tuple[bytes, ...]:
    return tuple(line.rstrip(b"\r\n") for line in data.splitlines())


def _ours_in(file: TouchedFile, data: bytes) -> list[int]:
    """Number the lines that are like one of ours."""
    ours = set(our_lines(file))
    return [number for number, line in enumerate(_bare(data), 1) if line in ours]


def _behind_anchor(file: TouchedFile, hunk: Hunk, hashes: tuple[str, ...]) -> int:
    anchor = file.anchor(hunk)
    found = places(hashes, anchor)
    if len(found) != 1:
        wanted = ranges(range(hunk.after - len(anchor) + 1, hunk.after + 1))
        how = f"there {len(found)} times" if found else "missing"
        raise S3Error(
            f"{file.path} cannot be patched: {wanted} of the release, behind which our lines go, {how} here: write "
            f"them by hand where the module ends: {b' / '.join(hunk.lines[1:]).decode()}"
        )
    return found[0] + len(anchor)


def _check_runs(file: TouchedFile, data: bytes) -> None:
    calls = {hunk.lines[-1].decode() for hunk in file.hunks}
    try:
        outside = {ast.unparse(statement) for statement in parse(data).body}
    except SyntaxError as error:
        raise S3Error(f"{file.path} would not be Python with our lines: line {error.lineno}: {error.msg}") from None
    if not calls <= outside:
        raise S3Error(f"{file.path} has the lines behind which ours go inside of a function: write ours by hand")
