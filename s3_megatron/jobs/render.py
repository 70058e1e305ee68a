"""From a job to its script: ``launch/slurm/*.j2``, filled in."""

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import s3_megatron
from s3_megatron import run_folder
from s3_megatron.checkpoints import lease, whole
from s3_megatron.errors import S3Error
from s3_megatron.jobs.flags import ENTRIES, megatron_flags
from s3_megatron.jobs.job import Job

TEMPLATES = Path(__file__).parent / "templates"  # a link to the project's launch/slurm/


class _Raw(str):
    """Text that goes into a script as it is: a number, a checked name, or what is quoted already."""


def render(job: Job, run: Path) -> str:
    """The script that trains ``job`` in the folder ``run``: for sbatch, or for a shell where there is no scheduler.

    Whatever a template prints is quoted for the shell, except where it says otherwise.

    Raises:
        S3Error: ``check_folder`` refuses ``run``.
    """
    check_folder(run)
    recipe, cluster = job.recipe, job.cluster
    template = _environment(run).get_template("job.sbatch.j2" if cluster.scheduler == "slurm" else "local.sh.j2")
    return template.render(
        job=job,
        recipe=recipe,
        cluster=cluster,
        slurm=cluster.slurm,
        container=cluster.container,
        restart=cluster.restart,
        health=cluster.health,
        watchdog=cluster.watchdog,
        run=str(run),
        folder=run_folder,
        lease=lease,
        pointers=(whole.MEGATRON_POINTER, whole.DEEPSPEED_POINTER),
        name=run.name,
        version=s3_megatron.__version__,
        entry=ENTRIES[recipe.engine],
        environment=_variables(job),
        mounts=_mounts(job, run),
        flags=megatron_flags(job, run),
    )


def check_folder(run: Path) -> None:
    """Refuse a folder that a script cannot name.

    Raises:
        S3Error: ``run`` has a line break, which no #SBATCH line can hold, or a backslash, at which Slurm takes the
            rest of a file name literally.
    """
    if not str(run).isprintable() or "\\" in str(run):
        raise S3Error(
            f"the run folder {str(run)!r} has a line break, a control character, a byte that is not UTF-8 or a "
            "backslash: choose another"
        )


def _environment(run: Path) -> Environment:
    def quoted(value: Any) -> str:
        return value if isinstance(value, _Raw) else shlex.quote(str(value))

    def word(value: str) -> str:
        """Quote a word of the command line; a path in the run folder begins with the variable."""
        rest = value.removeprefix(f"{run}/")
        return quoted(value) if rest == value else f'"$run"/{quoted(rest)}'

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        finalize=quoted,
        keep_trailing_newline=True,
        comment_start_string="<#",  # {# is how a shell asks for a length
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "raw": _Raw,
        "words": lambda words: _Raw(" ".join(word(one) for one in words)),
        "directive": lambda path: _Raw(_directive(path)),
        "filename": lambda path: _Raw(quoted(_pattern(path))),
    }
    return environment


def _variables(job: Job) -> dict[str, str]:
    cluster, layout = job.cluster, job.recipe.layout
    # Megatron validates by assertions, which PYTHONOPTIMIZE in the shell that submits would leave out.
    ours = {"PYTHONUNBUFFERED": "1", "PYTHONOPTIMIZE": "", "OMP_NUM_THREADS": "1"}
    if job.rehearsed:
        ours["S3_REHEARSAL"] = "1"
    # Megatron's rule (0.19.2, training/arguments.py): before Blackwell, the order of kernels is what overlaps
    # communication with computation where ranks share a layer.
    elif cluster.gpu.architecture != "blackwell" and layout.tensor * layout.context > 1:
        ours["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if cluster.network_interface is not None:
        ours |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.network_interface)
    return ours | cluster.environment


def _mounts(job: Job, run: Path) -> list[str]:
    """What the container sees of the host: ``run``, the data and the scratch folder, and what the cluster adds."""
    ours = dict.fromkeys((str(run), job.cluster.data_dir, job.cluster.scratch_dir))
    return [*(f"{folder}:{folder}" for folder in ours), *job.cluster.container.mounts]


def _pattern(path: str) -> str:
    """Double the percent signs of ``path``, except in %N: Slurm's file names are patterns."""
    return path.replace("%", "%%").replace("%%N.log", "%N.log")


def _directive(path: str) -> str:
    """Write ``path`` as the value of an #SBATCH line."""
    return '"' + _pattern(path).replace('"', '\\"') + '"'
