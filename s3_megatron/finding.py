"""One line of a report on a machine, a job, a node or a host; and all of them as a table for a terminal."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

# NOT_CHECKED: it cannot be seen from here, which does not make it good. WARNING: it may be meant so, or goes without.
OK, NOT_CHECKED, WARNING, ERROR = "ok", "not checked", "warning", "error"
_COLOURS = {OK: "green", NOT_CHECKED: "yellow", WARNING: "yellow", ERROR: "red"}


@dataclass(frozen=True)
class Finding:
    """``state`` is OK, NOT_CHECKED, WARNING or ERROR; ``found`` has the value in it, ``fix`` says what to do."""

    state: str
    name: str
    found: str
    fix: str = ""


def or_ok(name: str, found: str, problems: Iterable[Finding]) -> Iterator[Finding]:
    """The ``problems``, or where there is none, that ``found`` is in order."""
    wrong = list(problems)
    yield from wrong or [Finding(OK, name, found)]


def table(findings: Iterable[Finding]) -> "Table":
    """The findings, one a row. The state is a word, too: a log has no colours, and not everyone sees them."""
    from rich.markup import escape
    from rich.table import Table

    result = Table(box=None, pad_edge=False)
    for heading in ("", "", "found", "what to do"):
        result.add_column(heading, overflow="fold")
    for each in findings:
        colour = _COLOURS[each.state]
        result.add_row(
            *(escape(each.name), f"[{colour}]{each.state}[/]", f"[{colour}]{escape(each.found)}[/]", escape(each.fix))
        )
    return result
