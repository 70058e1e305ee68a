"""Everything that can be known to be wrong with a job before it is queued, in one list."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.finding import ERROR, WARNING, Finding
from s3_megatron.jobs import memory, throughput
from s3_megatron.jobs.checks import engines, numbers, places, resources
from s3_megatron.jobs.job import Job


@dataclass(frozen=True)
class Report:
    """What ``check`` found; ``memory`` is None where DeepSpeed's file cannot be read."""

    findings: list[Finding]
    memory: memory.Memory | None
    throughput: throughput.Throughput

    @property
    def errors(self) -> list[Finding]:
        """What must be mended before the job can run."""
        return [finding for finding in self.findings if finding.state == ERROR]

    @property
    def warnings(self) -> list[Finding]:
        """What may be meant so, or could not be checked here."""
        return [finding for finding in self.findings if finding.state == WARNING]


def check(job: Job, run: Path | None = None) -> Report:
    """Check ``job``, which would train in the folder ``run``; raises nothing, and takes the time of Megatron's import.

    Paths are looked at from this machine, so run it where the job is submitted.
    """
    run = run or Path(job.cluster.runs_dir) / job.recipe.name
    with ThreadPoolExecutor() as pool:
        slow = [pool.submit(_collected, look, job, run) for look in (engines.tokenizer, engines.parser)]
        quick = [
            finding
            for look in (numbers.check, engines.deepspeed, resources.check, places.check, _data)
            for finding in _collected(look, job, run)
        ]
        findings = [*quick, *(finding for future in slow for finding in future.result())]
    try:
        estimated = memory.estimate(job)
    except S3Error:  # a finding says why
        estimated = None
    return Report(findings, estimated, throughput.estimate(job))


def _data(job: Job, run: Path) -> Iterable[Finding]:
    """Count the data's tokens, with numpy, which the other commands of a login node do without."""
    try:
        from s3_megatron.jobs.checks import data
    except ImportError as missing:
        return [Finding(WARNING, "data tokens", f"not counted: {missing}", "run the check where numpy is installed")]
    return data.check(job, run)


def _collected(look: Callable[[Job, Path], Iterable[Finding]], job: Job, run: Path) -> list[Finding]:
    try:
        return list(look(job, run))
    except (S3Error, OSError) as error:
        return [Finding(ERROR, look.__module__.rpartition(".")[2], str(error))]
