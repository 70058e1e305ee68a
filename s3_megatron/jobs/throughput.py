"""How long a job takes: tokens, floating-point operations, days."""

from dataclasses import dataclass

from s3_megatron.jobs.job import Job
from s3_megatron.jobs.memory import padded_vocabulary


@dataclass(frozen=True)
class Throughput:
    """What a run amounts to; ``days`` is None on CPUs."""

    tokens_per_step: int
    steps: int
    flops_per_token: float
    days: float | None

    @property
    def tokens(self) -> int:
        """All that are trained on."""
        return self.tokens_per_step * self.steps


def flops_per_token(job: Job) -> float:
    """Floating-point operations of a token, forward and backward, without what is recomputed.

    Megatron's count (``megatron.training.training.num_floating_point_operations``, megatron-core 0.19.2): matrices,
    half of the attention scores, since the others are masked, and the padded logits.
    """
    model = job.recipe.model
    hidden = model.hidden_size
    layer = 4 * hidden * hidden + 2 * hidden * model.ffn_size + hidden * model.seq_length
    return 6.0 * (model.num_layers * layer + hidden * padded_vocabulary(job))


def estimate(job: Job) -> Throughput:
    """Estimate the days by the cluster's assumed ``model_flops_utilization`` of ``gpu.peak_tflops``.

    Saving, validation, queues and restarts come on top.
    """
    schedule, cluster = job.recipe.schedule, job.cluster
    tokens = schedule.global_batch_size * job.recipe.model.seq_length
    work = flops_per_token(job) * tokens * schedule.train_iters
    rate = job.ranks * cluster.gpu.peak_tflops * 1e12 * cluster.model_flops_utilization
    days = None if job.rehearsed else work / rate / 86400
    return Throughput(tokens, schedule.train_iters, flops_per_token(job), days)
