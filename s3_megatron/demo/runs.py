"""The training runs of the demonstration: jobs as of ``s3-megatron launch``."""

from s3_megatron import machine
from s3_megatron.errors import S3Error
from s3_megatron.jobs import compose
from s3_megatron.jobs.forecast import work
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.process import END_SOON
from s3_megatron.jobs.recipe import Data, Recipe
from s3_megatron.jobs.submit import here

RECIPE = "gpt2_tiny"
# What can be demonstrated, and what it is compared with.
RIVALS = {"s3": "adamw", "softsignum": "s3"}
# Soft from the middle on: the picture shows it, and the kill falls behind the switch.
_SETTINGS = {"softsignum": ["optimizer.soft_start=0.5"]}


def rival(optimizer: str) -> str:
    """What ``optimizer`` is compared with; raises S3Error where it is none that is demonstrated."""
    if optimizer not in RIVALS:
        raise S3Error(f"optimizer {optimizer!r} is not demonstrated: take {' or '.join(RIVALS)}")
    return RIVALS[optimizer]


def load(optimizer: str, engine: str | None, gpus: int = 0) -> Job:
    """The recipe with ``optimizer`` and, if given, ``engine``, on this machine.

    Its ranks are as many of the ``gpus`` as share the global batch evenly, or two processes on the CPU. Raises S3Error
    where there is no such engine.
    """
    chosen = [f"optimizer={optimizer}", f"cluster.accelerator={'gpu' if gpus else 'cpu'}"]
    chosen += _SETTINGS.get(optimizer, [])
    job = here(compose.load(RECIPE, "local", [*chosen, *([] if engine is None else [f"engine={engine}"])]))
    batch = job.recipe.schedule.global_batch_size
    ranks = max(n for n in range(1, gpus + 1) if batch % n == 0) if gpus else job.ranks
    environment = {"OMP_NUM_THREADS": str(max(1, machine.cores() // ranks)), **END_SOON}
    return Job(job.recipe, job.cluster.model_copy(update={"ranks_per_node": ranks, "environment": environment}))


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
