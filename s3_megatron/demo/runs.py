"""The training runs of the demonstration: jobs as of ``s3-megatron launch``, watched and interrupted from here."""

import os
import sys
from pathlib import Path

from s3_megatron import machine
from s3_megatron.files import write_file
from s3_megatron.jobs import compose
from s3_megatron.jobs.flags import ENTRIES, deepspeed_file, megatron_flags
from s3_megatron.jobs.forecast import Forecast, work
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.process import END_SOON
from s3_megatron.jobs.recipe import Data, Recipe
from s3_megatron.jobs.trial import Trial
from s3_megatron.run_folder import RunFolder

RECIPE = "gpt2_tiny"


def load(optimizer: str, engine: str | None, gpus: int = 0) -> Job:
    """The recipe with ``optimizer`` and, if given, ``engine``, on this machine.

    Its ranks are as many of the ``gpus`` as share the global batch evenly, or two processes on the CPU. Raises S3Error
    where there is no such engine.
    """
    chosen = [f"optimizer={optimizer}", f"cluster.accelerator={'gpu' if gpus else 'cpu'}"]
    job = compose.load(RECIPE, "local", [*chosen, *([] if engine is None else [f"engine={engine}"])])
    if not gpus:
        return job
    batch = job.recipe.schedule.global_batch_size
    ranks = max(n for n in range(1, gpus + 1) if batch % n == 0)
    return Job(job.recipe, job.cluster.model_copy(update={"ranks_per_node": ranks}))


def with_data(job: Job, data: Data) -> Job:
    """``job``, trained on ``data``."""
    return Job(job.recipe.model_copy(update={"data": data}), job.cluster)


def kill_at(recipe: Recipe) -> int:
    """The iteration of the kill: in mid-run, half-way between two checkpoints."""
    interval = recipe.checkpoint.save_interval
    return recipe.schedule.train_iters // interval // 2 * interval + interval // 2


def iterations_in_all(recipe: Recipe) -> float:
    """What the demonstration's three runs are in iterations of training, with those that the resume does once more."""
    return 3 * work(recipe.schedule) + kill_at(recipe) % recipe.checkpoint.save_interval


def trial(job: Job, run: Path, title: str, forecast: Forecast) -> Trial:
    """The run of ``job`` in the folder ``run``; torchrun picks a free port."""
    if job.recipe.engine == "deepspeed":
        write_file(RunFolder(run).deepspeed, deepspeed_file(job).read_bytes())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc_per_node", str(job.ranks)]
    flags = [word for words in megatron_flags(job, run) for word in words]
    command = [*launcher, "-m", ENTRIES[job.recipe.engine], *flags]
    return Trial(title, command, run, environment(job), job.recipe.schedule.train_iters, forecast)


def environment(job: Job) -> dict[str, str]:
    """The ranks' environment: the rehearsal where there is no GPU, and the cores shared out among them."""
    threads = max(1, machine.cores() // job.ranks)
    ours = {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1", **END_SOON}
    if job.rehearsed:
        ours["S3_REHEARSAL"] = "1"
    # Otherwise gloo looks for the address of this machine's name, which many a laptop's does not have.
    interface = machine.loopback()
    defaults = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
    return {**defaults, **os.environ, **ours}
