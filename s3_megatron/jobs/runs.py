"""Run folders: what a run is, on disk, and where its user finds it again."""

import json
import logging
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import s3_megatron
from s3_megatron.errors import S3Error
from s3_megatron.files import append_line, user_folder, write_file
from s3_megatron.jobs.catalog import as_yaml
from s3_megatron.jobs.cluster import Cluster
from s3_megatron.jobs.compose import load_plain
from s3_megatron.jobs.flags import deepspeed_file
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.node.environment import commit, public
from s3_megatron.jobs.recipe import Recipe
from s3_megatron.run_folder import BATCH_SCRIPT, SHELL_SCRIPT, RunFolder

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformer-engine")


@dataclass(frozen=True)
class Run(RunFolder):
    """A run that was made from a recipe, for a cluster."""

    @cached_property
    def label(self) -> str:
        """What commands take for this run, quoted for a shell: its name, or its folder where the name does not do."""
        try:
            by_name = find(self.path.name).path
        except (S3Error, OSError):
            by_name = None
        return shlex.quote(self.path.name if by_name == self.path else str(self.path))

    @cached_property
    def job(self) -> Job:
        """The recipe and the cluster; raises S3Error where an edit has broken them."""
        return Job(load_plain(Recipe, self.recipe), load_plain(Cluster, self.cluster))

    @property
    def job_ids(self) -> list[str]:
        """SLURM's numbers of the jobs submitted for it, the oldest first."""
        lines = self.jobs.read_bytes().splitlines() if self.jobs.exists() else []
        found = []
        for line in lines:
            with suppress(ValueError):  # a full disk cuts a line off
                found.append(json.loads(line)["job_id"])
        return found

    def submitted(self, job_id: str) -> None:
        """Note that ``job_id`` runs this."""
        append_line(self.jobs, json.dumps({"job_id": job_id, "time": _now()}).encode())


def create(job: Job, path: Path, script: str) -> Run:
    """Make the run folder ``path``, whole or not at all, and enter it into the user's list.

    Raises:
        S3Error: the folder is there already, or cannot be made.
    """
    if path.exists():
        again = f"s3-megatron resume {Run(path).label}"
        raise S3Error(f"{path} is there already: resume it ({again}), or choose another --name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f".{path.name}.{uuid.uuid4().hex}"
        draft.mkdir()  # and not mkdtemp, whose folder is for its owner alone whatever the umask is
    except OSError as error:
        raise S3Error(f"the run folder {path} cannot be made ({error}): set cluster.runs_dir") from error
    try:
        run = RunFolder(draft)
        run.rank_logs.mkdir(parents=True)
        name = BATCH_SCRIPT if job.cluster.scheduler == "slurm" else SHELL_SCRIPT
        write_file(draft / name, script.encode())
        write_file(run.recipe, as_yaml(job.recipe).encode())
        write_file(run.cluster, as_yaml(job.cluster).encode())
        write_about(run, {**_about(), "settings": settings(job, path)})
        if job.recipe.engine == "deepspeed":
            write_file(run.deepspeed, deepspeed_file(job).read_bytes())
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    try:
        _enter(path)
    except (S3Error, OSError) as error:  # the run itself needs no list
        logger.warning("%s is missing in the list of s3-megatron runs, name it by its folder: %s", path, error)
    return Run(path)


def settings(job: Job, folder: Path) -> dict[str, Any]:
    """What the script of ``job`` is made of: every setting, by its dotted key, a cluster's behind "cluster.".

    The script names its run's ``folder``, too.
    """
    both = {**job.recipe.model_dump(mode="json"), "cluster": job.cluster.model_dump(mode="json")}
    return {**dict(_flat(both)), "folder": str(folder.resolve())}


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_about(run: RunFolder, about: Mapping[str, Any]) -> None:
    """Write what made ``run``."""
    write_file(run.about, (json.dumps(about, indent=1) + "\n").encode())


def find(name: str) -> Run:
    """The run that ``name``, a folder or the name of one in the user's list, means.

    Raises:
        S3Error: there is none, or more than one: which of them to resume or to cancel is not for us to choose.
    """
    if os.path.isfile(RunFolder(Path(name)).recipe):
        return Run(Path(name).resolve())
    named = known_runs(name)
    if len(named) > 1:
        folders = ", ".join(str(run.path) for run in named)
        raise S3Error(f"{len(named)} runs are called {name!r}: give the folder of one: {folders}")
    if named:
        return named[0]
    few = ", ".join(run.path.name for run in known_runs()[-5:])
    raise S3Error(f"there is no run {name!r}: give its folder, or one of {few or '(none yet)'}; s3-megatron runs")


def known_runs(name: str | None = None) -> list[Run]:
    """The runs that this user has made and that are still there, the oldest first; those of one ``name``, if given.

    Raises:
        S3Error: the list cannot be read, or there is no home folder for one.
    """
    try:
        paths = _list().read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise S3Error(
            f"the list of runs cannot be read ({error}): set XDG_STATE_HOME to the folder that yours is in"
        ) from error
    listed = [Run(Path(os.fsdecode(path))) for path in dict.fromkeys(paths)]
    asked = [run for run in listed if name in (None, run.path.name)]  # before a file server is asked about each
    return [run for run in asked if os.path.isfile(run.recipe)]  # Path.is_file raises where a server is away


def _list() -> Path:
    return user_folder("XDG_STATE_HOME", ".local/state") / "s3-megatron" / "runs"


def _enter(path: Path) -> None:
    _list().parent.mkdir(parents=True, exist_ok=True)
    append_line(_list(), os.fsencode(path.resolve()))


def _about() -> dict[str, Any]:
    """What a person needs to make the run again."""
    return {
        "time": _now(),
        "command": sys.argv,
        "git": commit(),
        "versions": {"s3-megatron": s3_megatron.__version__, "python": sys.version.split()[0], **_versions()},
        "environment": public(os.environ),
    }


def _versions() -> Mapping[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not here"
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
