"""A training run that a person watches on this machine: to its end, or through the loss of a rank."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from rich.console import Console

from s3_megatron import machine
from s3_megatron.errors import S3Error
from s3_megatron.jobs import runs
from s3_megatron.jobs.forecast import Forecast
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.process import Training
from s3_megatron.jobs.progress import RunLine, run_line
from s3_megatron.jobs.render import render
from s3_megatron.watch.events import Event, Train
from s3_megatron.watch.file import Metrics


@dataclass(frozen=True)
class Interruption:
    """A kill and its resume: the last iteration that was logged before, and the one training went on from."""

    killed_at: int
    resumed_from: int

    @property
    def iterations_lost(self) -> int:
        """How many iterations had to be done again."""
        return self.killed_at - self.resumed_from

    def loss_gap(self, whole: Metrics, resumed: Metrics) -> float:
        """The largest difference of training loss after the resume, resumed against uninterrupted run; NaN if one is.

        Raises:
            S3Error: the resumed run lacks an iteration that the whole one has.
        """
        first = self.resumed_from + 1
        iterations = [i for i in whole.train if i >= first]
        missing = [i for i in iterations if i not in resumed.train]
        if missing or not iterations:
            raise S3Error(
                f"the resumed run has no loss of iteration {missing[0] if missing else first}, which the "
                "uninterrupted one has: run both again"
            )
        gaps = [abs(whole.train[i].losses["lm_loss"] - resumed.train[i].losses["lm_loss"]) for i in iterations]
        return float(np.max(gaps))  # Python's own passes over a NaN behind a number


@dataclass(frozen=True)
class Trial:
    """A run in the folder ``run`` that one command both starts and, where it has left a checkpoint, resumes.

    ``forecast`` is of all runs that belong together, and sees this one.
    """

    title: str
    command: Sequence[str]
    run: Path
    env: Mapping[str, str]
    iterations: int
    forecast: Forecast

    @classmethod
    def of(cls, job: Job, folder: Path, title: str, forecast: Forecast) -> Self:
        """Make the run folder ``folder`` of ``job``, which is for a cluster without a scheduler; its script is run.

        Raises:
            S3Error: the folder is there already, or cannot be made.
        """
        path = folder.resolve()
        run = runs.create(job, path, render(job, path))
        # Otherwise gloo looks for the address of this machine's name, which many a laptop's does not have.
        interface = machine.loopback()
        defaults = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
        command = ["bash", str(run.script)]
        return cls(title, command, path, {**defaults, **os.environ}, job.recipe.schedule.train_iters, forecast)

    def train(self, console: Console) -> None:
        """Run to the end, or raise S3Error with the reason."""
        with run_line(console, self.title, self.iterations) as line:
            self._finish(line)

    def train_through_a_kill(self, kill_at: int, console: Console) -> Interruption:
        """Run, kill one rank at iteration ``kill_at``, run the same command again to the end."""
        with run_line(console, self.title, self.iterations) as line:
            killed_at = 0
            with self._start(line) as training:
                for event in training.events():
                    self._see(event, line)
                    if isinstance(event, Train):
                        killed_at = event.iteration
                        if killed_at == kill_at:
                            line.note(f"SIGKILL to rank {training.kill_last_rank()} at iteration {killed_at}")
                if killed_at < kill_at:
                    training.check("training")
            line.note("the same command again")
            first = self._finish(line)
        return Interruption(killed_at, first - 1)

    def _see(self, event: Event, line: RunLine) -> None:
        line.event(event)
        self.forecast.event(event)

    def _start(self, line: RunLine) -> Training:
        line.status("starting ranks")
        self.forecast.started()
        return Training(self.command, self.run, self.env)

    def _finish(self, line: RunLine) -> int:
        """Run to the end; returns the first iteration that was done."""
        first = 0
        with self._start(line) as training:
            for event in training.events():
                if isinstance(event, Train) and not first:
                    first = event.iteration
                    if first > 1:
                        line.note(f"resumed from the checkpoint of iteration {first - 1}")
                self._see(event, line)
            training.check("training")
        if not first:
            raise S3Error(f"training ended without an iteration (whole log: {training.log})")
        line.status("done")
        return first
