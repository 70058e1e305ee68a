"""What a visit found: a table for people, all figures as JSON, and the logs in one archive."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from benchmarks.gpu.runner import FAILED, LATE, PASSED, Outcome, end_of
from s3_megatron.files import write_file

_MOST_LOG_BYTES = 2 * 2**20  # of one log, its end: all of them stay below what may come back of a file
_COLOURS = {PASSED: "green", FAILED: "red", LATE: "red"}


def figures(outcomes: Sequence[Outcome], folder: Path, card: dict[str, Any], command: str) -> dict[str, Any]:
    """Gather everything measured: by step, how it ended, what its program wrote, and its tests."""
    found = {}
    for outcome in outcomes:
        name = outcome.step.name
        entry: dict[str, Any] = {"state": outcome.state, "seconds": round(outcome.seconds, 1)}
        if outcome.reason:
            entry["reason"] = outcome.reason
        if (numbers := _read(folder / f"{name}.json")) is not None:
            entry["figures"] = numbers
        if (folder / f"{name}.xml").exists():
            entry["tests"] = tests(folder / f"{name}.xml")
        found[name] = entry
    return {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"), "card": card, "steps": found}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def tests(junit: Path) -> dict[str, Any]:
    """Counts of a pytest run, and what its tests recorded (``record_property``), by test."""
    try:
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    except ElementTree.ParseError:
        return {"passed": 0, "failed": 0, "skipped": 0, "recorded": {}, "failures": ["its results are cut off"]}
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    recorded = {
        str(case.get("name")): {str(one.get("name")): str(one.get("value")) for one in case.iter("property")}
        for case in cases
    }
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "recorded": {name: values for name, values in recorded.items() if values},
        "failures": [str(case.get("name")) for case in bad],
    }


def table(found: dict[str, Any]) -> Table:
    """One row a step: how it ended and what it found."""
    card = found["card"]
    title = card.get("name") or card.get("obstacle") or "no GPU was looked for"
    shown = Table(title=title, title_justify="left", box=None)
    for heading in ("step", "", "s", "found"):
        shown.add_column(heading, justify="right" if heading == "s" else "left", overflow="fold")
    for name, entry in found["steps"].items():
        state = Text(entry["state"], style=_COLOURS.get(entry["state"], "yellow"))
        shown.add_row(name, state, f"{entry['seconds']:.0f}", Text("\n".join(summary(name, entry))))
    return shown


def summary(name: str, entry: dict[str, Any]) -> Iterator[str]:
    """The lines of one step."""
    if "reason" in entry:
        yield entry["reason"]
    if ran := entry.get("tests"):
        yield ", ".join(f"{ran[kind]} {kind}" for kind in ("passed", "failed", "skipped") if ran[kind])
        yield from (f"failed: {one}" for one in ran["failures"])
        for values in ran["recorded"].values():
            yield ", ".join(f"{key} {value}" for key, value in values.items())
    measured = entry.get("figures")
    if not isinstance(measured, dict):
        return
    if name == "variants":
        yield f"copy {measured['copy_gbps']:.0f} GB/s over {measured['elements']:,} weights"
        for row in measured["rows"]:
            yield f"{row['case']}, {row['variant']}: {row['ms']:.2f} ms, {row['gbps']:.0f} GB/s, {row['of_copy']:.1%}"
    elif name == "bench":
        yield f"copy {measured['copy']:.0f} GB/s; fused AdamW's time is 1"
        for row in measured["rows"]:
            if row["name"].startswith("S3"):
                size = f"{row['parameters']:,} in {row['tensors']:,}"
                share = f"{row['share_of_copy']:.0%} of the copy"
                ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
                yield f"{row['name']}, {size}: {row['ms']:.2f} ms, {share}, {ratio}"
    elif "iterations" in measured:
        yield f"{measured['ms']:.0f} ms an iteration, {measured['optimizer_ms'] or 0:.1f} of them the optimizer's"
        if measured["peak_gib"]:
            share = measured["peak_gib"] / measured["estimated_gib"]
            yield f"peak {measured['peak_gib']:.1f} GiB, {share:.2f} of the estimate"


def archive(folder: Path, target: Path) -> None:
    """Put every log and test result into one file, of a long log the end."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=3) as tar:
        for path in sorted([*folder.glob("*.log"), *folder.glob("*.xml")]):
            content = end_of(path, _MOST_LOG_BYTES)
            entry = tarfile.TarInfo(path.name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    write_file(target, packed.getvalue())
