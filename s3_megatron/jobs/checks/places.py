"""Paths: whether they are there, and whether every node sees them."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from s3_megatron.finding import ERROR, OK, WARNING, Finding, or_ok
from s3_megatron.jobs.job import Job

_OCTAL = re.compile(rb"\\([0-7]{3})")
_PRIVATE = ("/tmp", "/var/tmp", "/dev/shm")
_IN_MEMORY = {"tmpfs", "ramfs"}
_ON_A_DISK = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay"}


def check(job: Job, run: Path) -> Iterator[Finding]:
    """Check every path that ranks read or write, as this machine sees it."""
    inside = [(key, path) for key, path in _paths(job) if _in_container_only(job, path)]
    for key, path in inside:
        yield Finding(OK, key, f"{path} is under a mount's target, inside the container: not checked")
    seen = [(key, path) for key, path in _paths(job) if (key, path) not in inside]
    for key, path in seen:
        yield from or_ok(key, str(path), [*_there(key, path), *(_shared(job, key, path) if _many(job) else ())])
    yield from _interpreter(job)
    folders = job.cluster.shared_dirs
    if _many(job) and _covers(folders, os.path.realpath(job.cluster.scratch_dir)):
        yield Finding(
            WARNING,
            "scratch_dir",
            f"{job.cluster.scratch_dir} is under cluster.shared_dirs: all nodes would compile into one folder",
            "name a folder on each node's own disk, such as /tmp",
        )


def _many(job: Job) -> bool:
    return job.recipe.layout.nodes > 1


def _paths(job: Job) -> list[tuple[str, Path]]:
    """What each rank opens, by the setting that names it."""
    data, cluster = job.recipe.data, job.cluster
    folder = Path(cluster.data_dir)
    paths = [("runs_dir", Path(cluster.runs_dir))]
    if not data.mock:
        prefixes = (("data.train", data.train), ("data.validation", data.validation))
        paths += [(key, folder / f"{prefix}{end}") for key, prefix in prefixes for end in (".bin", ".idx")]
        if data.tokenizer_model is not None:
            paths.append(("data.tokenizer_model", folder / data.tokenizer_model))
        if data.tokenizer.startswith("hf:/"):
            paths.append(("data.tokenizer", Path(data.tokenizer.removeprefix("hf:"))))
    if cluster.container.image is not None and cluster.container.image.startswith("/"):  # else a name in a registry
        paths.append(("container.image", Path(cluster.container.image)))
    if cluster.container.kind == "none" and cluster.python.startswith("/"):
        paths.append(("python", Path(cluster.python)))
    return paths


def _in_container_only(job: Job, path: Path) -> bool:
    pairs = [mount.split(":")[:2] for mount in job.cluster.container.mounts]
    targets = [pair[-1] for pair in pairs if len(set(pair)) == 2]
    return str(path) != job.cluster.container.image and _covers(targets, os.path.normpath(path))


def _covers(folders: Sequence[str], path: str) -> bool:
    return any(Path(path).is_relative_to(os.path.normpath(folder)) for folder in folders)


def _interpreter(job: Job) -> Iterator[Finding]:
    cluster = job.cluster
    if cluster.container.kind != "none":
        yield Finding(OK, "python", f"{cluster.python} inside the image: not checked")
    elif not cluster.python.startswith("/") and cluster.scheduler == "slurm":
        yield Finding(
            WARNING,
            "python",
            f"{cluster.python}: whichever the node's PATH finds first",
            "name it in full, such as /shared/venv/bin/python",
        )


def _there(key: str, path: Path) -> Iterator[Finding]:
    if key == "runs_dir":
        existing = _existing(path)
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            yield Finding(
                ERROR,
                key,
                f"{path}: {existing} is not a folder that you can write in",
                "set cluster.runs_dir to a folder of yours",
            )
        return
    fixes = {
        "data": "prepare it with 's3-megatron data prepare', or mend the path; it begins at cluster.data_dir",
        "container": "build the image (Dockerfile), or mend the path",
        "python": "install s3-megatron there, or mend the path",
    }
    if not os.path.exists(path):  # which, unlike Path's, is False too where a folder above cannot be entered
        yield Finding(ERROR, key, f"{path} does not exist here", fixes[key.partition(".")[0]])
    elif not os.access(path, os.X_OK if key == "python" else os.R_OK):
        yield Finding(ERROR, key, f"{path} cannot be {'run' if key == 'python' else 'read'} by you", "ask its owner")


def _existing(path: Path) -> Path:
    """The deepest part of ``path`` that exists."""
    path = path.absolute()
    return next(part for part in (path, *path.parents) if os.path.exists(part))


def _shared(job: Job, key: str, path: Path) -> Iterator[Finding]:
    """What speaks against every node seeing ``path``.

    Where the cluster names its shared folders, they decide. Where it does not, a file system in memory or a folder
    for temporary files is refused, and one on a disk only warned of: the login node may be the one that exports it.
    """
    folders = job.cluster.shared_dirs
    if folders:
        outside = not _covers(folders, os.path.normpath(path))
        # A virtual environment's python is a link to the system's, which every node has.
        real = os.path.realpath(path.parent if key == "python" else path)
        if outside or not _covers([os.path.realpath(folder) for folder in folders], real):
            yield Finding(
                ERROR,
                key,
                f"{path}{'' if outside else f' leads to {real}, which'} is not under cluster.shared_dirs "
                f"({', '.join(folders)}): other nodes would not find it",
                "move it there, or add the folder to cluster.shared_dirs if every node has it mounted",
            )
        return
    kind = _file_system(path)
    if kind in _IN_MEMORY or _covers(_PRIVATE, os.path.realpath(path)):
        yield Finding(
            ERROR,
            key,
            f"{path} is on this machine alone ({kind}): other nodes would not find it",
            "move it to shared storage, and name that in cluster.shared_dirs",
        )
    elif kind in _ON_A_DISK:
        yield Finding(
            WARNING,
            key,
            f"{path} is on a {kind} file system, which other nodes see only if this machine exports it",
            "move it to shared storage, or name the folder in cluster.shared_dirs if every node has it mounted",
        )


def _file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that ``path`` is on, or would be; "" where it is unknown."""
    try:
        lines = [line.split() for line in mounts.read_bytes().splitlines()]
    except OSError:  # no Linux
        return ""
    # Spaces and their kin are octal in there. The last line of a mount point counts, and the longest mount point.
    points = {os.fsdecode(_OCTAL.sub(lambda code: bytes([int(code[1], 8)]), line[1])): line[2] for line in lines}
    real = Path(os.path.realpath(path))
    return next((points[str(part)].decode() for part in (real, *real.parents) if str(part) in points), "")
