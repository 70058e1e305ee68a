"""Cells: single training runs, and the file that keeps what came of them."""

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import s3_megatron
from s3_megatron.errors import S3Error
from s3_megatron.evidence.experiments import Experiment, Setup, rules

type Result = dict[str, Any]

# What decides a run's losses, beside torch: the report's code may change under a cells file.
CODE = (
    *(f"evidence/{name}.py" for name in ("contenders", "stack", "text", "training", "unfinished")),
    *("kernels", "optim"),
)


@dataclass(frozen=True)
class Cell:
    """One run: everything that its losses follow from."""

    contender: str
    optimizer: str
    setup_name: str
    setup: Setup
    rate: float
    settings: str  # JSON, so that cells are hashable
    seed: int
    text: str  # SHA-256

    @cached_property
    def key(self) -> str:
        """Name the run, for ever: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(rules(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def configuration(self) -> tuple[float, str]:
        """Rate and settings: what tuning chooses."""
        return self.rate, self.settings


def commit() -> str:
    """Name the commit that runs, with "-dirty" where files differ from it; outside of a checkout, the release."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment may lie in another project's checkout
        return git("describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return f"unknown (release {s3_megatron.__version__})"


def code_sha256() -> str:
    """Hash the sources that a run's losses depend on."""
    root = Path(s3_megatron.__file__).parent
    digest = hashlib.sha256()
    for name in CODE:
        for path in sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name]:
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class CellsFile:
    """``cells.jsonl``: a first line that says of which experiment, text and code it is, then a line a finished cell."""

    def __init__(self, path: Path, experiment: Experiment, text: str) -> None:
        """Open the file, or begin it; a last line that a kill cut short is dropped.

        Raises:
            S3Error: it belongs to another experiment, text or code, or cannot be read or written; or is a record's.
        """
        if path.with_name(f"{path.name}.xz").exists():
            raise S3Error(f"{path.parent} is a record, which stays as it is: give another folder by --out")
        self.path = path
        self.head: dict[str, str] = {
            "experiment": experiment.name,
            "rules": experiment.sha256[:16],
            "text": text[:16],
            "code": code_sha256(),
        }
        self.results: dict[str, Result] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise S3Error(f"{path} cannot be used: {error.strerror or error}") from None

    def _open(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            self.path.unlink(missing_ok=True)
            self._append({**self.head, "commit": commit()})
            return
        head, *results = read_lines(self.path, whole)
        check_head(self.path, head, self.head, "give another folder by --out")
        if whole != data:
            os.truncate(self.path, len(whole))
        self.results = {result["key"]: result for result in results}

    def add(self, results: Iterable[Result]) -> None:
        """Append finished cells; they are on the disk when this returns, or the file is as it was.

        Raises:
            S3Error: the disk is full, or gone.
        """
        for result in results:
            self._append(result)
            self.results[result["key"]] = result

    def _append(self, content: Result) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(_finite(content), allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            raise S3Error(f"{self.path} cannot be written: {error.strerror or error}; what it has is whole") from None


def check_head(path: Path, head: Result, ours: dict[str, str], otherwise: str) -> None:
    """Raise S3Error where a cells file's first line is not as ``ours``; it ends with what to do ``otherwise``."""
    for what, value in ours.items():
        if head.get(what) != value:
            raise S3Error(
                f"{path} has cells of another {what} ({head.get(what)}, and this is {value}): check out commit "
                f"{head.get('commit')}, with which it was begun, or {otherwise}"
            )


# What is read of a cell.
FIELDS = {
    **dict.fromkeys(("key", "contender", "setup", "weights", "order"), str),
    **dict.fromkeys(("rate", "seconds"), int | float),
    "seed": int,
    "settings": dict,
    "spikes": list,
    "validation": int | float | None,
    "diverged": int | None,
}


def read_lines(path: Path, data: bytes) -> list[dict[str, Any]]:
    """Parse a cells file; raises S3Error naming the line that is none, or is a cell once more with other figures."""
    lines: list[dict[str, Any]] = []
    seen: dict[Any, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("it is no cell")
            for name, kind in FIELDS.items() if number > 1 else ():
                if not isinstance(content.get(name), kind):
                    raise ValueError(f"its {name} is {content.get(name)!r}")
            first = seen.setdefault(content["key"], number) if number > 1 else number
            if first != number and content != lines[first - 1]:
                raise ValueError(f"it is line {first}'s cell once more, and differs from it")
        except ValueError as error:
            remedy = "remove the line, and its cell is run again" if number > 1 else "it names the experiment: mend it"
            raise S3Error(f"{path}, line {number}: {error}; {remedy}, or give another folder by --out") from None
        lines.append(content)
    return lines


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return {key: _finite(part) for key, part in value.items()} if isinstance(value, dict) else value
