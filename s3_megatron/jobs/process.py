"""Starting a training run on this machine, following it, losing one of its ranks, and ending it cleanly."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from s3_megatron.errors import S3Error
from s3_megatron.jobs.node.processes import ranks
from s3_megatron.run_folder import RunFolder
from s3_megatron.watch.events import Event
from s3_megatron.watch.file import Tail

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


class Guarded:
    """A running command that ends with this program, however that ends; leaving the ``with`` block ends it, too.

    It has a session of its own, so that Ctrl-C reaches this program only. A guard stands between the two and ends the
    command in order when the pipe to it is closed, which the kernel does even where this program is killed.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        """Start ``command``; what it prints is appended to ``log``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        guard = [sys.executable, "-m", "s3_megatron.jobs.guard", str(PATIENCE)]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
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
        """End whatever is left, in PATIENCE seconds and a few; a second Ctrl-C does not cut that short."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        again: BaseException | None = None
        while self.running():
            try:
                self._process.wait()
            except (KeyboardInterrupt, SystemExit) as stop:
                again = stop
        if again is not None and error is None:
            raise again

    @property
    def pid(self) -> int:
        """The process id of the guard."""
        return self._process.pid

    def running(self) -> bool:
        """Whether the command has not ended yet."""
        return self._process.poll() is None

    def check(self, what: str) -> None:
        """Wait for the end, and raise S3Error with the reasons found in the log where ``what`` has failed."""
        status = self._process.wait()
        if status:
            raise S3Error(f"{what} ended with status {status}: {self._reason()} (whole log: {self.log})")

    def _reason(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            lines = [_SPEAKER.sub("", line).strip() for line in file.read().decode(errors="replace").splitlines()]
        reasons = dict.fromkeys(found[1] for line in lines if (found := _VERDICT.match(line)))
        reasons = reasons or dict.fromkeys(line for line in lines if _REASON.match(line))
        return "; ".join(list(reasons)[:3]) or " / ".join([line for line in lines if line][-3:])


class Training(Guarded):
    """A running command, torchrun at or below it, and what it logs."""

    def __init__(self, command: Sequence[str], run: Path, env: Mapping[str, str]) -> None:
        """Start ``command``, which trains in the folder ``run``; what it prints is appended to its logs/job.log."""
        folder = RunFolder(run)
        self._tail = Tail(folder.watch)
        super().__init__(command, folder.job_log, env)

    def events(self) -> Iterator[Event]:
        """Yield what the run logs until it has ended."""
        running = True
        while running:
            running = self.running()  # asked before reading: nothing written last is missed
            yield from self._tail.events()
            time.sleep(0.1)

    def kill_last_rank(self) -> int:
        """Send SIGKILL to the rank with the highest number, as a node's failure or the OOM killer would; returns it.

        The helper processes of the ranks (Megatron writes checkpoints with some) outlive them, until the guard ends.
        """
        # Parents come before their children here, so the first with ranks below it is torchrun.
        family = psutil.Process(self.pid).children(recursive=True)
        torchrun = next(filter(None, (ranks(process.pid) for process in family)))
        last = max(torchrun, key=lambda rank: rank.rank)
        last.process.kill()
        return last.rank
