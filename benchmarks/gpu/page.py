"""The results that are kept, as Markdown: ``python -m benchmarks.gpu.page`` prints what docs/kernels.md has of GPUs.

A visit's gpu.json and logs.tgz go into benchmarks/results/gpu/CARD-DATE/, as H200-2026-11-28.
"""

import json
from pathlib import Path

from benchmarks.gpu import report
from benchmarks.gpu.steps import ROOT

RESULTS = ROOT / "benchmarks/results/gpu"
NONE = "Not measured on a GPU yet: `make gpu` is ready, and its dry run is green."


def page(folder: Path = RESULTS) -> str:
    """A table a visit, or one line where there has been none."""
    visits = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/gpu.json"))]
    visits = [found for found in visits if "name" in found["card"]]  # not a rehearsal, nor where there was no GPU
    if not visits:
        return NONE
    parts = []
    for found in visits:
        card = found["card"]
        made = f"driver {card.get('driver')}, torch {card['torch']}, {found['date'][:10]}, `{found['command']}`"
        title = f"{card['name']}, {made}:"
        rows = [
            f"| {name} | {entry['state']} | {entry['seconds']:.0f} | {'<br>'.join(report.summary(name, entry))} |"
            for name, entry in found["steps"].items()
        ]
        parts.append("\n".join([title, "", "| step | | s | found |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
