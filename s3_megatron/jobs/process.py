"""Starting a training run on this machine, following it, losing one of its ranks, and ending it cleanly."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from s3_megatron.errors import S3Error
from s3_megatron.jobs.node.processes import ranks
from s3_megatron.watch.metrics import FILE_NAME

# The node agent's last line, which names the failure that came first.
_VERDICT = re.compile(r"^attempt: \w+ on \S+: (.+)")
# Without an agent: a line of a log that names the reason; what torchrun adds about its children does not.
_REASON = re.compile(r"^(?!.*ChildFailedError).*?(\berror: |\b\w+(Error|Exception): ).*")
# What torchrun and Python put before a rank's lines; every rank says the same behind it.
_SPEAKER = re.compile(r"^(\[\w*rank\d+\]:)+")

# Seconds that a run has to end in order before it is killed.
PATIENCE = 10

# A killed rank's peers hang in gloo: 5 seconds are enough to end them.
END_SOON = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}


class Tail:
    """Reads the events that a run appends to its metrics file, from now on."""

    def __init__(self, watch_dir: Path) -> None:
        """Start at the present end of ``watch_dir``'s metrics file, which need not exist yet."""
        self._path = watch_dir / FILE_NAME
        self._offset = self._path.stat().st_size if self._path.exists() else 0

    def events(self) -> list[dict[str, Any]]:
        """Return the events of the whole lines written since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, _, _ = file.read().rpartition(b"\n")
        if not whole:
            return []
        self._offset += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines() if line]


class Training:
    """A running command, torchrun at or below it, and what it logs; leaving the ``with`` block ends all of it.

    It has a session of its own, so that Ctrl-C reaches this program only, which then ends it in order.
    """

    def __init__(self, command: Sequence[str], run: Path, env: Mapping[str, str]) -> None:
        """Start ``command``, which trains in the folder ``run``; what it prints is appended to its logs/job.log."""
        self.log = run / "logs" / "job.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._tail = Tail(run / "watch")
        self._family: list[psutil.Process] = []
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ask the command to end, which passes it on to the ranks; after PATIENCE end whatever is left."""
        if self._process.poll() is None:
            self._family = self._descendants()
            self._process.send_signal(signal.SIGTERM)
            psutil.wait_procs([*self._family, psutil.Process(self.pid)], timeout=PATIENCE)
            self._process.kill()
        for process in self._family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._family, timeout=PATIENCE)
        self._process.wait()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what the run logs until it has ended."""
        running = True
        while running:
            running = self._process.poll() is None  # asked before reading: nothing written last is missed
            yield from self._tail.events()
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        """The process id of the command."""
        return self._process.pid

    def kill_last_rank(self) -> int:
        """Send SIGKILL to the rank with the highest number, as a node's failure or the OOM killer would; returns it.

        The helper processes of the ranks (Megatron writes checkpoints with some) would outlive them: they are
        remembered, and end with the ``with`` block.
        """
        self._family = self._descendants()
        # Parents come before their children here, so the first with ranks below it is torchrun.
        torchrun = next(filter(None, map(ranks, (self.pid, *(process.pid for process in self._family)))))
        last = max(torchrun, key=lambda rank: rank.rank)
        last.process.kill()
        return last.rank

    def check(self) -> None:
        """Raise S3Error with the reasons found in the log when the run has failed."""
        status = self._process.wait()
        if status:
            raise S3Error(f"training ended with status {status}: {self._reason()} (whole log: {self.log})")

    def _descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def _reason(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            lines = [_SPEAKER.sub("", line).strip() for line in file.read().decode(errors="replace").splitlines()]
        reasons = dict.fromkeys(found[1] for line in lines if (found := _VERDICT.match(line)))
        reasons = reasons or dict.fromkeys(line for line in lines if _REASON.match(line))
        return "; ".join(list(reasons)[:3]) or " / ".join([line for line in lines if line][-3:])
