"""pytest's junit report, read."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree


def outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """Yield of every test its class name, its name, and what became of it: "passed", "failed" or "skipped"."""
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        yield case.get("classname", ""), case.get("name", ""), outcome
