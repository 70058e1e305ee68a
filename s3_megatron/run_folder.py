"""The folder of a run: what everything in it is called, and the small files by which its programs know of each other.

The ranks, the programs on the nodes, the batch script (``jobs/render.py`` hands it these names) and the commands of a
login node meet here, so this imports no torch.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.files import append_line, write_file

# The environment variable by which a job's processes find the folder.
VARIABLE = "S3_RUN_DIR"

FINISHED, ENDED = "FINISHED", "ENDED"
SAVE, STOP = "SAVE", "STOP"
CHAIN = "chain"
ATTEMPTS, CACHE, CHECKPOINTS, LOGS, WATCH = "attempts", "cache", "checkpoints", "logs", "watch"
BATCH_SCRIPT, SHELL_SCRIPT = "job.sbatch", "job.sh"
RANK_LOGS, JOB_LOG = f"{LOGS}/ranks", f"{LOGS}/job.log"
BAD_NODES = "bad_nodes"


@dataclass(frozen=True)
class RunFolder:
    """One run; nothing in it need exist yet."""

    path: Path

    @property
    def script(self) -> Path:
        """The script, for sbatch or for a shell; raises S3Error where the run has none."""
        for path in (self.path / BATCH_SCRIPT, self.path / SHELL_SCRIPT):
            if path.exists():
                return path
        raise S3Error(
            f"{self.path.name} has neither {BATCH_SCRIPT} nor {SHELL_SCRIPT}: bring it back to {self.path}, or submit "
            "its recipe.yaml as a new run"
        )

    @property
    def recipe(self) -> Path:
        """Every setting of the recipe, the defaults included."""
        return self.path / "recipe.yaml"

    @property
    def cluster(self) -> Path:
        """Every setting of the cluster."""
        return self.path / "cluster.yaml"

    @property
    def about(self) -> Path:
        """What made the run: commit, versions, environment, and the settings that the script was made of."""
        return self.path / "about.json"

    @property
    def deepspeed(self) -> Path:
        """DeepSpeed's configuration, of a run with that engine."""
        return self.path / "deepspeed.json"

    @property
    def jobs(self) -> Path:
        """SLURM's numbers of the jobs submitted for it, one a line."""
        return self.path / "jobs.jsonl"

    @property
    def cache(self) -> Path:
        """Megatron's indices into the data."""
        return self.path / CACHE

    @property
    def checkpoints(self) -> Path:
        """Megatron's or DeepSpeed's checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def watch(self) -> Path:
        """The folder of the metrics file."""
        return self.path / WATCH

    @property
    def logs(self) -> Path:
        """NODE.log of every node, job.log, and the folder ``ranks``."""
        return self.path / LOGS

    @property
    def job_log(self) -> Path:
        """What the script prints."""
        return self.path / JOB_LOG

    @property
    def rank_logs(self) -> Path:
        """The ranks' logs, in folders of torchrun's."""
        return self.path / RANK_LOGS

    @property
    def save_request(self) -> Path:
        """There where a person wants a checkpoint at the next logged iteration."""
        return self.path / SAVE

    @property
    def stop_request(self) -> Path:
        """There where a person wants the run to save and end."""
        return self.path / STOP

    @property
    def finished(self) -> bool:
        """Whether training has reached its last iteration."""
        return (self.path / FINISHED).exists()

    def finish(self, iteration: int) -> None:
        """Write that training has reached its last iteration, ``iteration``."""
        write_file(self.path / FINISHED, json.dumps({"iteration": iteration, "time": time.time()}).encode() + b"\n")

    @property
    def ended(self) -> str | None:
        """Why no further start follows although training has not finished."""
        path = self.path / ENDED
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else None

    def end(self, why: str) -> None:
        """Write that no further start follows, and why: one line."""
        write_file(self.path / ENDED, f"{why}\n".encode())

    def reopen(self) -> None:
        """Forget that and why the run ended, that it was asked to stop, and what the chain of starts remembers.

        Raises S3Error where a file cannot be removed.
        """
        for name in (ENDED, STOP, CHAIN):
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise S3Error(
                    f"{self.path / name} cannot be removed ({error.strerror}): remove it, and resume"
                ) from error

    def attempt(self, name: str) -> "Attempt":
        """The start ``name``: JOB-N of SLURM's Nth restart of a job, local-TIME without a scheduler."""
        return Attempt(self.path / ATTEMPTS / name)

    def attempts(self) -> list["Attempt"]:
        """Every start that was made, the first first."""
        folders = [path for path in (self.path / ATTEMPTS).glob("*") if path.is_dir()]
        # By mtime, which a folder keeps when it is moved to another disk: ctime is then that of the copy.
        return [Attempt(path) for path in sorted(folders, key=lambda path: path.stat().st_mtime)]


@dataclass(frozen=True)
class Attempt:
    """One start of a run, on every node; each writes files of its own, under its own name."""

    path: Path

    def verdict(self, node: str) -> Path:
        """How the attempt ended on ``node``."""
        return self.path / f"{node}.json"

    def failures(self, node: str) -> Path:
        """The failures of ``node``'s ranks, the first first."""
        return self.path / f"{node}.failures.json"

    def health(self, node: str) -> Path:
        """What was found on ``node`` before training."""
        return self.path / f"{node}.health.json"

    @property
    def hang(self) -> Path:
        """The folder with the stacks of ranks that hung."""
        return self.path / "hang"

    def report_bad_node(self, node: str, reason: str) -> None:
        """Append a line to ``bad_nodes``, as several nodes may at the same time."""
        self.path.mkdir(parents=True, exist_ok=True)
        append_line(self.path / BAD_NODES, f"{node}\t{' '.join(reason.split())}".encode())

    def bad_nodes(self) -> list[str]:
        """The nodes for which another start should go without them, each with its reason behind it."""
        path = self.path / BAD_NODES
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        return [": ".join(line.split("\t", 1)) for line in lines]


def of_this_job() -> RunFolder | None:
    """The run that this process works for; None outside a job."""
    path = os.environ.get(VARIABLE)
    return RunFolder(Path(path)) if path else None
