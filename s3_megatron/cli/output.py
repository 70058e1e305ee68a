"""Where commands write."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from s3_megatron.finding import Finding, table

console = Console()
errors = Console(stderr=True)


def line(text: str) -> None:
    """Print ``text`` as it is: a line to be pasted must not be broken where the terminal ends."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def print_table(rows: Table) -> None:
    """Print ``rows``; where that is no terminal, each on one line, for whoever searches it."""
    wide = console if console.is_terminal else Console(file=console.file, width=1000)
    wide.print(rows)


def report(findings: Iterable[Finding]) -> None:
    """Print ``findings`` as a table."""
    print_table(table(findings))


def printable(text: str) -> str:
    """``text`` with bytes that are no UTF-8, as a file's name may have, escaped: no terminal takes them."""
    return text.encode(errors="backslashreplace").decode()
