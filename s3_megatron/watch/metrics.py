"""The metrics file of a run: one JSON object a line."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends events to ``directory/metrics.jsonl``; a resumed run goes on in the same file."""

    def __init__(self, directory: Path) -> None:
        """Create ``directory`` where it is missing, and end the line that a kill tore off."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / FILE_NAME
        if self._path.exists() and (text := self._path.read_bytes()) and not text.endswith(b"\n"):
            self._append("\n")

    def write(self, event: dict[str, Any]) -> None:
        """Append one line in one write, so that a killed run leaves at most one torn line."""
        self._append(json.dumps(event) + "\n")

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)


@dataclass
class Metrics:
    """A run as its file tells it; train, validation and test are keyed by iteration."""

    optimizer: dict[str, Any] = field(default_factory=dict)
    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    validation: dict[int, dict[str, Any]] = field(default_factory=dict)
    test: dict[int, dict[str, Any]] = field(default_factory=dict)


def read_metrics(directory: Path) -> Metrics:
    """Read ``directory/metrics.jsonl``; of an iteration done twice (a resumed run) the last counts.

    A torn line, which a kill in mid-write leaves, is passed over. A missing file reads as an empty run.
    """
    metrics = Metrics()
    path = directory / FILE_NAME
    if not path.exists():
        return metrics
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event["event"] == "optimizer":
            metrics.optimizer = event
        else:
            getattr(metrics, event["event"])[event["iteration"]] = event
    return metrics
