"""How an attempt ended on one node, in a file that the batch script and ``s3-megatron status`` read."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from s3_megatron.errors import S3Error
from s3_megatron.files import write_file
from s3_megatron.run_folder import Attempt
from s3_megatron.watch.file import newest_train

# The variable that names the file in which torchrun describes what failed.
FAILURES = "S3_FAILURES"
# Exit codes: the agent's, but for BAD_NODES, with which the checks before training end.
CONFIGURATION, BAD_NODES, HANG, STOPPED = 2, 3, 75, 143
Kind = Literal["finished", "saved", "configuration", "hang", "stopped", "failed"]


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended here; ``error`` is {rank, host, message, time}, of the rank that failed first.

    ``exit_code`` is the agent's: docs/jobs.md has the contract. ``iteration`` is the last one that was logged; times
    are seconds since 1970.
    """

    verdict: Kind
    exit_code: int
    error: dict[str, Any] | None
    started: float
    ended: float
    iteration: int | None

    def write(self, attempt: Attempt, host: str) -> None:
        """Write the verdict of ``host``."""
        write_file(attempt.verdict(host), json.dumps(asdict(self), indent=2).encode() + b"\n")


def judge(code: int, finished: bool, hung: bool, stopped: bool, elsewhere: dict[str, Any] | None) -> tuple[Kind, int]:
    """Judge by the command's exit code and by what happened to it; returns the verdict and the agent's exit code.

    ``elsewhere`` is the verdict of a node that ended badly before: SLURM then ends the others with SIGTERM, too. A
    finished run has saved everything: what a rank does after that is no failure of it.
    """
    if finished:
        return "finished", 0
    if hung:
        return "hang", HANG
    if code == 0:
        return "saved", 0
    if code == CONFIGURATION:
        return "configuration", CONFIGURATION
    if stopped and elsewhere is None:
        return "stopped", STOPPED
    return "failed", 1


def first_failure(path: Path) -> dict[str, Any] | None:
    """Read the first failure from what s3_megatron.jobs.node.torchrun wrote to ``path``."""
    if not path.exists():
        return None
    first = json.loads(path.read_text(encoding="utf-8"))[0]
    return {name: first[name] for name in ("rank", "host", "message", "time")}


def read(attempt: Attempt) -> dict[str, dict[str, Any]]:
    """Read how ``attempt`` ended on each node that has written it, by the node's name; see Verdict."""
    found = {}
    for path in attempt.path.glob("*.json"):
        with suppress(ValueError):  # not JSON: no program of ours writes halves
            found[path.stem] = json.loads(path.read_bytes())
    # Failures and health, beside them, are lists.
    return {host: about for host, about in found.items() if isinstance(about, dict) and "verdict" in about}


def bad_end_elsewhere(attempt: Attempt, host: str) -> dict[str, Any] | None:
    """Read the verdict of another node that was the first to fail or hang, if one did."""
    others = [about for name, about in read(attempt).items() if name != host]
    bad = [about for about in others if about["verdict"] in ("failed", "hang", "configuration")]
    return min(bad, key=lambda about: about["ended"], default=None)


def last_iteration(watch: Path) -> int | None:
    """Read the last iteration that was logged in ``watch``, a folder of s3_megatron.watch."""
    with suppress(S3Error):  # a verdict without it is better than none
        for event in newest_train(watch, 1):
            return event.iteration
    return None
