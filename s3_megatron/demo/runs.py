"""The three training runs: S3 undisturbed, S3 killed and resumed, AdamW."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from s3_megatron.demo.launch import Training, environment
from s3_megatron.demo.progress import RunLine, run_line
from s3_megatron.demo.recipe import WITHOUT_ACCELERATIONS, engine, flags, optimizer_flags, torchrun
from s3_megatron.errors import S3Error


@dataclass(frozen=True)
class Interruption:
    """A kill and its resume: the last iteration that was logged before, and the one training went on from."""

    killed_at: int
    resumed_from: int


@dataclass(frozen=True)
class Trainer:
    """Starts runs of one configuration on one data set, each in a folder of its own under ``folder``."""

    config: dict[str, Any]
    data_flags: list[str]
    folder: Path
    gpus: int
    console: Console

    @property
    def ranks(self) -> int:
        """As many GPUs as share the global batch evenly, or two processes on the CPU."""
        batch: int = self.config["run"]["global_batch_size"]
        return max(n for n in range(1, self.gpus + 1) if batch % n == 0) if self.gpus else 2

    @property
    def kill_at(self) -> int:
        """The iteration of the kill: in mid-run, half-way between two checkpoints."""
        interval: int = self.config["checkpoint"]["save_interval"]
        return self.config["run"]["train_iters"] // interval // 2 * interval + interval // 2

    def command(self, name: str, optimizer: str) -> list[str]:
        """The one command that both starts the run and, where it has left a checkpoint, resumes it."""
        folder = self.folder / name
        config = self.config
        trains = engine(config)
        entry_flags = [
            *flags({**config["model"], **config["run"], **config["checkpoint"]}),
            *flags({"micro_batch_size": config["run"]["global_batch_size"] // self.ranks}),
            *optimizer_flags(optimizer, config["optimizer"]),
            "--bf16",
            *trains.flags,
            *flags({"save": folder / "checkpoints", "load": folder / "checkpoints", "watch_dir": folder}),
            *self.data_flags,
            *flags({"data_cache_path": self.folder / "cache"}),
            *(WITHOUT_ACCELERATIONS if self.gpus else []),
        ]
        return torchrun(self.ranks, trains.entry, entry_flags)

    def train(self, name: str, title: str, optimizer: str) -> None:
        """Run to the end, or raise S3Error with the reason."""
        with self._line(title) as line:
            self._finish(name, optimizer, line)

    def train_through_a_kill(self, name: str, title: str, optimizer: str) -> Interruption:
        """Run, kill one rank at ``kill_at``, run the same command again to the end."""
        with self._line(title) as line:
            killed_at = 0
            with self._start(name, optimizer, line) as training:
                for event in training.events():
                    line.event(event)
                    if event["event"] == "train":
                        killed_at = event["iteration"]
                        if killed_at == self.kill_at:
                            training.kill_last_rank()
                            line.note(f"SIGKILL to rank {self.ranks - 1} at iteration {killed_at}")
                if killed_at < self.kill_at:
                    training.check()
            line.note("the same command again")
            first = self._finish(name, optimizer, line)
        return Interruption(killed_at, first - 1)

    def _line(self, title: str) -> AbstractContextManager[RunLine]:
        return run_line(self.console, title, self.config["run"]["train_iters"])

    def _start(self, name: str, optimizer: str, line: RunLine) -> Training:
        line.status("starting ranks")
        return Training(
            self.command(name, optimizer), self.folder / name, environment(gpus=self.gpus, ranks=self.ranks)
        )

    def _finish(self, name: str, optimizer: str, line: RunLine) -> int:
        """Run to the end; returns the first iteration that was done."""
        first = 0
        with self._start(name, optimizer, line) as training:
            for event in training.events():
                if event["event"] == "train" and not first:
                    first = event["iteration"]
                    if first > 1:
                        line.note(f"resumed from the checkpoint of iteration {first - 1}")
                line.event(event)
            training.check()
        if not first:
            raise S3Error(f"training ended without an iteration (whole log: {training.log})")
        line.status("done")
        return first
