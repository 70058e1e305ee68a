"""Memory and days."""

from collections.abc import Iterator
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.finding import ERROR, OK, WARNING, Finding
from s3_megatron.jobs import memory, throughput
from s3_megatron.jobs.job import Job

MARGIN = 0.1


def check(job: Job, run: Path) -> Iterator[Finding]:
    """Estimate both."""
    yield _memory(job)
    yield _days(job)


def _memory(job: Job) -> Finding:
    try:
        estimate = memory.estimate(job)
    except S3Error:
        return Finding(WARNING, "memory", "not estimated: DeepSpeed's file cannot be read", "mend that first")
    billions = f"{memory.parameters(job) / 1e9:.3f} billion parameters"
    if job.rehearsed:
        return Finding(OK, "memory", f"{billions}; ranks on CPUs, so nothing about a GPU")
    size, margin = job.cluster.gpu.memory_gib, estimate.margin(job.cluster.gpu.memory_gib)
    parts = ", ".join(
        f"{name} {size / memory.GIB:.1f}" for name, size in _named(estimate).items() if size >= memory.GIB / 20
    )
    found = f"{billions}; {estimate.total / memory.GIB:.1f} of {size:g} GiB a GPU, {margin:.0%} free: {parts}"
    if estimate.host:
        found += f"; {estimate.host * job.cluster.ranks_per_node / memory.GIB:.0f} GiB of each node's own memory"
    if margin >= MARGIN:
        return Finding(OK, "memory", found)
    fix = (
        "a smaller schedule.micro_batch_size, layout.recompute selective or full, more layout.tensor or "
        "layout.pipeline, or more nodes"
    )
    return Finding(ERROR if margin < 0 else WARNING, "memory", found, fix)


def _named(estimate: memory.Memory) -> dict[str, int]:
    parts = estimate.parts
    return {
        "weights": parts["weights"],
        "gradients": parts["gradients"],
        "masters, m and r": parts["masters"] + parts["exp_avg"] + parts["exp_avg_root"],
        "activations": parts["activations"],
        "logits": parts["logits"],
        "DeepSpeed's buffers": parts["buffers"],
        "CUDA and NCCL (a guess)": parts["fixed"],
    }


def _days(job: Job) -> Finding:
    run, cluster = throughput.estimate(job), job.cluster
    found = f"{run.tokens:,} tokens in {run.steps} steps of {run.tokens_per_step:,}"
    if run.days is None:
        return Finding(OK, "days", f"{found}; ranks on CPUs, so no estimate of days")
    long = f"{run.days:.1f} days" if run.days >= 1 else f"{run.days * 24:.1f} hours"
    return Finding(
        OK,
        "days",
        f"{found}; {long} on {job.ranks} GPUs at an assumed {cluster.model_flops_utilization:.0%} of "
        f"{cluster.gpu.peak_tflops:g} TFLOP/s, {run.flops_per_token / 1e9:.3g} GFLOP a token",
    )
