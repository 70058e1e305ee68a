"""A comparison that is called in this process, a clock for it, and the tables of its report."""

import io
import re

from rich.console import Console

from s3_megatron.evidence import compare


def run(asked, folder, workers=2):
    console = Console(file=io.StringIO())
    return compare.compare(asked, folder, console, device="cpu", minutes=60, workers=workers)


class Clock:
    """Time that passes only where work is done."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """A report's tables by their headings: rows by the columns' names."""
    found, title, names = {}, "", []
    for line in text.splitlines():
        if line.startswith("#"):
            title, names = line.lstrip("# "), []
        elif line.startswith("|"):
            values = [value.strip() for value in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not names:
                names = values
            elif set(line) - set("| -"):
                found.setdefault(title, []).append(dict(zip(names, values, strict=True)))
    return found
