"""The one process of a job on each node: it starts torchrun, watches it, and writes how it ended."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import psutil

from s3_megatron.checkpoints import lease
from s3_megatron.checkpoints.whole import repair_pointer
from s3_megatron.errors import S3Error
from s3_megatron.jobs.node import environment, verdict
from s3_megatron.jobs.node.processes import adopt_orphans, kill_descendants, ranks
from s3_megatron.jobs.node.verdict import Verdict
from s3_megatron.jobs.node.watchdog import Watchdog, dump_ranks
from s3_megatron.machine import node_name
from s3_megatron.run_folder import VARIABLE, RunFolder
from s3_megatron.watch.file import FILE_NAME

_TICK_SECONDS = 0.5


class Agent:
    """One attempt at a run, on one node."""

    def __init__(self, run: Path, attempt: str, start_minutes: float, hang_minutes: float) -> None:
        """Work for the attempt ``attempt`` in the run folder ``run``."""
        self._run = RunFolder(run)
        self._attempt = self._run.attempt(attempt)
        self._host = node_name()
        self._failures = self._attempt.failures(self._host)
        self._start_seconds, self._hang_seconds = start_minutes * 60, hang_minutes * 60
        self._started = time.time()
        self._stopped = self._interrupted = False
        self._lost: str | None = None  # who has taken the run folder
        self._signalled: set[psutil.Process] = set()

    def main(self, command: Sequence[str]) -> int:
        """Run ``command`` (torchrun) to its end; returns the exit code of docs/jobs.md's contract."""
        # SIGHUP: the terminal of a run on one's own machine was closed.
        self._listen(signal.SIGTERM, signal.SIGHUP)
        adopt_orphans()
        if os.environ.get("SLURM_NODEID", "0") != "0":
            return self._train(command)
        try:
            with lease.held(self._run.checkpoints, self._lose):
                return self._train(command, self._prepare)
        except lease.FolderIsHeld as error:
            # Neither a verdict nor ENDED: the run is another's, and goes on.
            print(f"s3_megatron: error: {error}", flush=True)
            return verdict.CONFIGURATION

    def _lose(self, why: str) -> None:
        self._lost = why

    def _train(self, command: Sequence[str], prepare: Callable[[], None] = lambda: None) -> int:
        self._listen(signal.SIGINT)  # until now it ends the wait for the folder
        try:
            prepare()
        except S3Error as error:
            return self._end(verdict.CONFIGURATION, False, self._error(str(error)))
        hung = False
        try:
            code = self._watch(command)
            if code is None:
                code, hung = -signal.SIGKILL, True
        finally:
            kill_descendants()
        first = verdict.first_failure(self._failures) if self._lost is None else self._error(self._lost)
        return self._end(code, hung, first)

    def _listen(self, *numbers: signal.Signals) -> None:
        """Remember these signals, but for one that is ignored, as SIGHUP under nohup."""
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        # No exception: a second Ctrl-C would end this process while it ends the others.
        self._stopped = True
        self._interrupted |= number == signal.SIGINT

    def _prepare(self) -> None:
        for line in environment.report():
            print(f"environment: {line}", flush=True)
        if repaired := repair_pointer(self._run.checkpoints):
            print(f"checkpoints: {repaired}", flush=True)

    def _watch(self, command: Sequence[str]) -> int | None:
        """Start ``command`` and wait for its end; returns its exit code, or None where it hangs."""
        watchdog = Watchdog(self._run.watch / FILE_NAME, self._start_seconds, self._hang_seconds)
        settings = {VARIABLE: os.fspath(self._run.path), verdict.FAILURES: os.fspath(self._failures)}
        try:
            # A session of its own: a Ctrl-C at the terminal is for this process, which then ends all others.
            child = subprocess.Popen(command, env={**os.environ, **settings}, start_new_session=True)
        except OSError as error:
            raise S3Error(f"{command[0]} does not start: {error.strerror}") from error
        while True:
            try:
                return child.wait(_TICK_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            if self._lost is not None:
                return 1
            if self._interrupted:
                return -signal.SIGINT
            if self._stopped:
                self._forward_sigterm(child.pid)
            if (silent := watchdog.silence()) is not None:
                count = dump_ranks(child.pid, self._attempt)
                print(
                    f"hang: no iteration for {silent / 60:.1f} minutes; the stacks of {count} ranks are in "
                    f"{self._attempt.hang}",
                    flush=True,
                )
                return None

    def _forward_sigterm(self, torchrun: int) -> None:
        """Send SIGTERM to every rank once: SLURM may have sent it to this process alone, or before a rank was there.

        A second one changes nothing where Megatron waits for it (--exit-signal-handler), and what does not yet has
        nothing to save.
        """
        for rank in ranks(torchrun):
            if rank.process not in self._signalled:
                self._signalled.add(rank.process)
                rank.process.send_signal(signal.SIGTERM)

    def _error(self, message: str, rank: int | None = None) -> dict[str, object]:
        return {"rank": rank, "host": self._host, "message": message, "time": time.time()}

    def _end(self, code: int, hung: bool, error: dict[str, object] | None) -> int:
        finished = self._run.finished
        elsewhere = verdict.bad_end_elsewhere(self._attempt, self._host)
        kind, exit_code = verdict.judge(code, finished, hung, self._stopped, elsewhere)
        if kind in ("finished", "saved"):
            error = None
        elif self._stopped and elsewhere is not None:
            error = elsewhere["error"]  # what came first, and ended this node, too
        elif hung:
            error = self._error(f"no iteration was logged for too long: {self._attempt.hang} has the stacks")
        elif error is None:
            error = self._error(f"torchrun ended with exit code {code} and did not say why")
        iteration = verdict.last_iteration(self._run.watch)
        done = Verdict(kind, exit_code, error, self._started, time.time(), iteration)
        done.write(self._attempt, self._host)
        if kind == "configuration" and error is not None:
            self._run.end(f"configuration error: {error['message']}")
        print(f"attempt: {kind} on {self._host}{f': {error["message"]}' if error else ''}", flush=True)
        return exit_code
