"""The outcomes that are written down: tests/peers/VERSION.txt, for each version of torch's tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
WORDS = ("passed", "failed", "skipped", "absent")


class Outcome(NamedTuple):
    """What became of a test with S3 and with AdamW."""

    s3: str
    adamw: str


BOTH_PASSED = Outcome("passed", "passed")


def versions() -> list[str]:
    """The versions of torch whose tests have a list."""
    return sorted(path.stem for path in HERE.glob("[0-9]*.txt"))


def read(version: str) -> dict[str, Outcome]:
    """The tests that do not pass with both: lines of S3's outcome, AdamW's and the test, below a line with the reason.

    Raises:
        ValueError: a line cannot be read, a test comes twice, or has no reason.
    """
    found: dict[str, Outcome] = {}
    reason = ""
    for line in (HERE / f"{version}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            reason = line.removeprefix("#").strip()
        elif not line:
            reason = ""
        else:
            s3, adamw, test = line.split(maxsplit=2)
            if test in found or not reason or {s3, adamw} - set(WORDS) or (s3, adamw) == BOTH_PASSED:
                raise ValueError(f"{version}.txt: {line!r} comes twice, has no reason, or is nothing to write down")
            found[test] = Outcome(s3, adamw)
    return found


def differences(found: Mapping[str, Outcome], expected: Mapping[str, Outcome]) -> list[str]:
    """One line for each test whose outcome is not the one written down, or that was not run."""
    lines = []
    for test in sorted({*found, *expected}):
        was, wanted = found.get(test, Outcome("absent", "absent")), expected.get(test, BOTH_PASSED)
        if was != wanted:
            lines.append(f"{test}: S3 {was.s3}, AdamW {was.adamw}; written down: S3 {wanted.s3}, AdamW {wanted.adamw}")
    return lines
