"""Starting a distributed training run, following it, losing one of its ranks, and ending it cleanly."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from s3_megatron.errors import S3Error
from s3_megatron.watch.metrics import FILE_NAME

# A line of a log that names the reason; what torchrun adds about its children does not.
_REASON = re.compile(r"^(?!.*ChildFailedError).*?(\berror: |\b\w+(Error|Exception): ).*")

# Seconds that a run has to end in order before it is killed.
PATIENCE = 10


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
    """A running torchrun and what it logs; leaving the ``with`` block ends whatever of it still runs.

    It has a session of its own, so that Ctrl-C reaches the demonstration only, which then ends it in order.
    """

    def __init__(self, command: list[str], folder: Path, env: Mapping[str, str]) -> None:
        """Start ``command``, whose ``--watch-dir`` is ``folder``; what it prints is appended to its log.txt."""
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._tail = Tail(folder)
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
        """Ask torchrun to end, which passes it on to the ranks; after PATIENCE end whatever is left."""
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
        """The process id of torchrun."""
        return self._process.pid

    def kill_last_rank(self) -> None:
        """Send SIGKILL to the rank with the highest number, as a node's failure or the OOM killer would.

        The helper processes of the ranks (Megatron writes checkpoints with some) would outlive them: they are
        remembered, and end with the ``with`` block.
        """
        self._family = self._descendants()
        max(psutil.Process(self.pid).children(), key=lambda rank: int(rank.environ()["RANK"])).kill()

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
            lines = file.read().decode(errors="replace").splitlines()
        # Every rank says the same, after its name.
        reasons = dict.fromkeys(re.sub(r"^\[rank\d+\]:", "", line).strip() for line in lines if _REASON.match(line))
        return "; ".join(list(reasons)[:3]) or " / ".join([line.strip() for line in lines if line.strip()][-3:])


def environment(*, gpus: int, ranks: int) -> dict[str, str]:
    """The ranks' environment: the rehearsal where there is no GPU, and the cores shared out among them."""
    cores = len(os.sched_getaffinity(0))
    ours = {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    # A killed rank's peers hang in gloo: 5 seconds are enough to end them.
    ours["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "5"
    if not gpus:
        ours["S3_REHEARSAL"] = "1"
    return {**os.environ, **ours}
