"""Numbers that must divide each other, or follow each other in time."""

from collections.abc import Iterator
from pathlib import Path

from s3_megatron.finding import ERROR, WARNING, Finding, or_ok
from s3_megatron.jobs import memory, throughput
from s3_megatron.jobs.job import Job

# A save, a validation or a slow file system keeps a healthy run quiet for minutes.
QUIET_MINUTES = 5


def check(job: Job, run: Path) -> Iterator[Finding]:
    """Check layout, batch and schedule."""
    recipe, layout, schedule = job.recipe, job.recipe.layout, job.recipe.schedule
    parts = f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}"
    yield from or_ok("ranks", f"{job.ranks} = {parts} x data {job.data_parallel}", _ranks(job, parts))
    shape = f"{recipe.model.num_layers} layers, {recipe.model.num_attention_heads} heads, "
    shape += f"width {recipe.model.hidden_size}, sequence {recipe.model.seq_length}"
    yield from or_ok("model", shape, _shape(job))
    yield from or_ok("layout", parts, _placed(job))
    batch = f"{schedule.global_batch_size} = {memory.microbatches(job)} micro-batches of {job.micro_batch_size} "
    yield from or_ok("batch", batch + f"on {job.data_parallel} data-parallel ranks", _batch(job))
    warmup = f"{schedule.train_iters} iterations, warm-up {schedule.lr_warmup_iters}"
    yield from or_ok("schedule", warmup, _schedule(job))
    yield from or_ok("checkpoints", f"every {recipe.checkpoint.save_interval} iterations", _checkpoints(job))
    yield from or_ok("time", _times(job), _time(job))


def _ranks(job: Job, parts: str) -> Iterator[Finding]:
    if job.ranks % job.model_parallel:
        yield Finding(
            ERROR,
            "ranks",
            f"{job.ranks} (nodes {job.recipe.layout.nodes} x ranks_per_node {job.cluster.ranks_per_node}) is not a "
            f"multiple of {parts} = {job.model_parallel}",
            f"make layout.nodes x cluster.ranks_per_node a multiple of {job.model_parallel}, or split the model less",
        )


def _shape(job: Job) -> Iterator[Finding]:
    model, layout = job.recipe.model, job.recipe.layout
    pairs = [
        ("hidden_size", model.hidden_size, "model.num_attention_heads", model.num_attention_heads),
        ("num_attention_heads", model.num_attention_heads, "layout.tensor", layout.tensor),
        ("hidden_size", model.hidden_size, "layout.tensor", layout.tensor),
        ("ffn_hidden_size", model.ffn_size, "layout.tensor", layout.tensor),
        ("num_layers", model.num_layers, "layout.pipeline", layout.pipeline),
    ]
    if layout.context > 1:  # Megatron gives each rank two pieces, an early and a late one, as causal attention asks for
        pairs.append(("seq_length", model.seq_length, "2 x layout.context", 2 * layout.context))
    if layout.sequence_parallel:
        pairs.append(("seq_length", model.seq_length, "layout.tensor x context", layout.tensor * layout.context))
    for key, value, divisor_key, divisor in pairs:
        if value % divisor:
            yield Finding(
                ERROR,
                "model",
                f"model.{key} {value} is not a multiple of {divisor_key} {divisor}",
                f"make it {-(-value // divisor) * divisor}, or change {divisor_key}",
            )


def _placed(job: Job) -> Iterator[Finding]:
    layout, cluster = job.recipe.layout, job.cluster
    if layout.nodes > 1 and cluster.ranks_per_node % layout.tensor:
        yield Finding(
            WARNING,
            "layout",
            f"layout.tensor {layout.tensor} crosses nodes of {cluster.ranks_per_node} ranks: every layer then waits "
            "for the network",
            "make it a divisor of cluster.ranks_per_node, and use layout.pipeline for the rest",
        )
    if layout.sequence_parallel and layout.tensor == 1:
        yield Finding(
            WARNING, "layout", "layout.sequence_parallel does nothing with layout.tensor 1", "set it to false"
        )
    for key, wanted in (
        ("sequence_parallel true", layout.sequence_parallel and layout.tensor > 1),
        (f"context {layout.context}", layout.context > 1),
    ):
        if wanted and job.rehearsed:
            yield Finding(
                ERROR,
                "layout",
                f"layout.{key} on CPUs: Megatron refuses it without Transformer Engine, which needs GPUs",
                "leave it out of the rehearsal: --set layout.sequence_parallel=false --set layout.context=1",
            )
        elif wanted and not cluster.transformer_engine:
            yield Finding(
                ERROR,
                "layout",
                f"layout.{key} without Transformer Engine and Apex: Megatron's own layers refuse it",
                "install both and set cluster.transformer_engine=true, use a container that has them, or turn it off",
            )
    connections = cluster.environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if connections != "1" and layout.tensor * layout.context > 1 and cluster.gpu.architecture != "blackwell":
        yield Finding(
            ERROR,
            "layout",
            f"cluster.environment has CUDA_DEVICE_MAX_CONNECTIONS {connections}: Megatron wants 1 with tensor or "
            f"context parallelism on {cluster.gpu.architecture}",
            "leave it out: the job sets it",
        )


def _batch(job: Job) -> Iterator[Finding]:
    schedule = job.recipe.schedule
    together = job.micro_batch_size * job.data_parallel
    if together and schedule.global_batch_size % together:
        yield Finding(
            ERROR,
            "batch",
            f"schedule.global_batch_size {schedule.global_batch_size} is not a multiple of schedule.micro_batch_size "
            f"{job.micro_batch_size} x {job.data_parallel} data-parallel ranks = {together}",
            f"make it {-(-schedule.global_batch_size // together) * together}, or micro_batch_size smaller",
        )


def _schedule(job: Job) -> Iterator[Finding]:
    schedule = job.recipe.schedule
    decay = schedule.lr_decay_iters or schedule.train_iters
    for key, end in (("train_iters", schedule.train_iters), ("lr_decay_iters", decay)):
        if schedule.lr_warmup_iters >= end:
            yield Finding(
                ERROR,
                "schedule",
                f"schedule.lr_warmup_iters {schedule.lr_warmup_iters} is not below schedule.{key} {end}",
                f"make it at most {end - 1}; a few hundredths of the run are usual",
            )


def _checkpoints(job: Job) -> Iterator[Finding]:
    checkpoint, iterations = job.recipe.checkpoint, job.recipe.schedule.train_iters
    retain = checkpoint.save_retain_interval
    if retain is not None and retain % checkpoint.save_interval:
        yield Finding(
            ERROR,
            "checkpoints",
            f"checkpoint.save_retain_interval {retain} is not a multiple of checkpoint.save_interval "
            f"{checkpoint.save_interval}",
            f"make it {-(-retain // checkpoint.save_interval) * checkpoint.save_interval}",
        )
    if checkpoint.save_interval > iterations:
        yield Finding(
            WARNING,
            "checkpoints",
            f"checkpoint.save_interval {checkpoint.save_interval} is beyond schedule.train_iters {iterations}: saved "
            "only at the end, or when the job is asked to stop; a failure loses everything",
            f"make it at most {iterations}",
        )


def _times(job: Job) -> str:
    hang = f"hung after {job.cluster.watchdog.hang_minutes:g} minutes without an iteration"
    if job.cluster.scheduler == "none":
        return hang
    return f"{job.cluster.slurm.time_limit_minutes} minutes a job, {hang}"


def _time(job: Job) -> Iterator[Finding]:
    watchdog, restart, limit = job.cluster.watchdog, job.cluster.restart, job.cluster.slurm.time_limit_minutes
    days = throughput.estimate(job).days
    if days is not None:
        # The run speaks every log_interval iterations, and a validation's forward pass is a third of an iteration.
        quiet = job.recipe.log.log_interval + job.recipe.schedule.eval_iters / 3
        minutes = max(3 * quiet * days * 1440 / job.recipe.schedule.train_iters, QUIET_MINUTES)
        if watchdog.hang_minutes < minutes:
            yield Finding(
                WARNING,
                "time",
                f"cluster.watchdog.hang_minutes {watchdog.hang_minutes:g}: a healthy run may be quiet for as long, "
                f"since it speaks every {job.recipe.log.log_interval} iterations and validates and saves between",
                f"make it at least {minutes:.0f}, or log.log_interval smaller",
            )
    if job.cluster.scheduler == "none":
        return
    if restart.signal_seconds >= 60 * restart.save_margin_minutes:
        yield Finding(
            WARNING,
            "time",
            f"cluster.restart.signal_seconds {restart.signal_seconds} is not below save_margin_minutes "
            f"{restart.save_margin_minutes}: SIGTERM comes before training ends in order",
            f"make it less than {60 * restart.save_margin_minutes}",
        )
    trains = limit - max(restart.save_margin_minutes, restart.signal_seconds / 60)
    if trains <= min(watchdog.start_minutes, 10):  # an hour is patience; a start takes minutes
        yield Finding(
            ERROR if trains <= 0 else WARNING,
            "time",
            f"cluster.slurm.time_limit_minutes {limit} less the margins leaves {max(trains, 0):g} minutes to start and "
            "train: each job of the chain may end before it has got further",
            "make the limit longer, or restart.save_margin_minutes and restart.signal_seconds shorter",
        )
