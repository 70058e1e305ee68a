"""One line of a report."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """``state`` is OK, WARNING or ERROR; ``found`` has the value in it, ``fix`` says what to do."""

    state: str
    name: str
    found: str
    fix: str = ""


def or_ok(name: str, found: str, problems: Iterable[Finding]) -> Iterator[Finding]:
    """The ``problems``, or where there is none, that ``found`` is in order."""
    wrong = list(problems)
    yield from wrong or [Finding(OK, name, found)]
