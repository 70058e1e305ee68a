"""How much memory a rank of a job takes, before there is a GPU to run out of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from s3_megatron.errors import S3Error
from s3_megatron.jobs.flags import deepspeed_file
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.recipe import Model, OwnOptimizer
from s3_megatron.optim import registry
from s3_megatron.optim.spec import NAMES

GIB = 2**30

# A guess, not measured here: about half a GiB for the CUDA context and its kernels, the rest for the buffers of a few
# NCCL communicators and cuBLAS workspaces. What is left over must also hold gradients of activations that live for a
# moment, and what PyTorch's allocator cannot put together: hence the warning below a tenth of the GPU.
FIXED = 2 * GIB


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank of a job, by what they are for; ``stage`` is its place in the pipeline.

    ``buffers`` are DeepSpeed's, for gradients on their way and weights gathered; ``logits`` live once, between the
    passes. ``host`` is beside the GPU, for what DeepSpeed offloads, and does not count in ``total``.
    """

    stage: int
    weights: int
    gradients: int
    masters: int
    exp_avg: int
    exp_avg_root: int
    activations: int
    logits: int
    buffers: int = 0
    fixed: int = FIXED
    host: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """What ``total`` is the sum of."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("stage", "host")}

    @property
    def total(self) -> int:
        """Bytes on the GPU at the peak."""
        return sum(self.parts.values())

    def margin(self, memory_gib: float) -> float:
        """The share of a GPU with so many GiB that stays free; negative where the job does not fit."""
        return 1 - self.total / (memory_gib * GIB)


def padded_vocabulary(job: Job) -> int:
    """Rows of the embedding: a multiple of 128 for every tensor rank.

    ``megatron.training.vocab_utils.calculate_padded_vocab_size`` (megatron-core 0.19.2), by its default flags.
    """
    multiple = 128 * job.recipe.layout.tensor
    return -(-job.recipe.model.vocab_size // multiple) * multiple


def parameters(job: Job) -> int:
    """The number of parameters of the model, on all ranks that share one copy; the tied embedding counts once."""
    model = job.recipe.model
    split, whole = _layer_parameters(model)
    embeddings = (padded_vocabulary(job) + model.seq_length) * model.hidden_size
    return model.num_layers * (split + whole) + embeddings + 2 * model.hidden_size


def shard_parameters(job: Job, stage: int) -> int:
    """The number of parameters of one tensor rank in pipeline stage ``stage``, counted from 0.

    Tensor ranks share matrices and their column-wise biases; norms, row-wise biases and positions are on each. The
    first stage has the embeddings, and the last one a copy of the tied one.
    """
    model, layout = job.recipe.model, job.recipe.layout
    split, whole = _layer_parameters(model)
    count = stage_layers(job) * (split // layout.tensor + whole)
    if stage == 0:
        count += model.seq_length * model.hidden_size
    if stage == layout.pipeline - 1:
        count += 2 * model.hidden_size
    if stage in (0, layout.pipeline - 1):
        count += padded_vocabulary(job) // layout.tensor * model.hidden_size
    return count


def stage_layers(job: Job) -> int:
    """Layers in a stage, the fullest one's where they do not divide."""
    return -(-job.recipe.model.num_layers // job.recipe.layout.pipeline)


def estimate(job: Job) -> Memory:
    """Estimate the memory of the fullest rank, without what the recipe's extra ``flags`` change.

    Raises:
        S3Error: the engine is DeepSpeed, and its JSON file cannot be read.
    """
    zero = zero_section(job) if job.recipe.engine == "deepspeed" else None
    stages = (_stage(job, stage, zero) for stage in range(job.recipe.layout.pipeline))
    return max(stages, key=lambda memory: memory.total)


def zero_section(job: Job) -> dict[str, Any]:
    """DeepSpeed's JSON file, its ``zero_optimization`` with ``state_dtype`` of the optimizer beside it.

    Raises:
        S3Error: it is not there, or no JSON object with such sections.
    """
    config = deepspeed_json(job)
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise S3Error(f'{deepspeed_file(job)} has zero_optimization {zero!r}: give an object with a "stage" of 0 to 3')
    params = config.get("optimizer", {}).get("params", {})
    return {**zero, "state_dtype": params.get("state_dtype", "float32")}


def deepspeed_json(job: Job) -> dict[str, Any]:
    """The configuration that ``job`` gives DeepSpeed, as it is in the file; raises S3Error where it cannot be read."""
    path = deepspeed_file(job)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise S3Error(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("optimizer", {}), dict):
        raise S3Error(f"{path} holds no JSON object with a section for each subject")
    return config


def _layer_parameters(model: Model) -> tuple[int, int]:
    """Parameters of a layer that tensor ranks share, and that each of them has."""
    return _matrices(model) + 3 * model.hidden_size + model.ffn_size, 6 * model.hidden_size


def _matrices(model: Model) -> int:
    """Parameters of a layer's matrices."""
    return 4 * model.hidden_size**2 + 2 * model.hidden_size * model.ffn_size


def _stage(job: Job, stage: int, zero: Mapping[str, Any] | None) -> Memory:
    count = shard_parameters(job, stage)
    second = _with_second_state(job, count, stage)
    states = _megatron_states(job, count, second) if zero is None else _deepspeed_states(job, count, second, zero)
    logits = _logits(job) if stage == job.recipe.layout.pipeline - 1 else 0
    return Memory(stage=stage, activations=activations(job, stage), logits=logits, **states)


def _megatron_states(job: Job, count: int, second: int) -> dict[str, int]:
    """Megatron's distributed optimizer (megatron-core 0.19.2, core/optimizer/distrib_optimizer.py).

    Gradients are accumulated in a float32 buffer of the whole shard. Masters, m and r are divided among the ranks that
    hold the same weights; of whole matrices, which the layer-wise optimizer deals out, as evenly as they come out. A
    float32 model is its own master. ``second`` is how many of ``count`` weights have a second state.
    """
    sharers = max(job.data_parallel * job.recipe.layout.context, 1)
    share = -(-count // sharers)
    return {
        "weights": _width(job) * count,
        "gradients": 4 * count,
        "masters": 4 * share if job.recipe.precision == "bf16" else 0,
        "exp_avg": 4 * share,
        "exp_avg_root": 4 * -(-second // sharers),
    }


def _deepspeed_states(job: Job, count: int, second: int, zero: Mapping[str, Any]) -> dict[str, int]:
    """DeepSpeed 0.19.8 as the entry configures it: gradients are accumulated and reduced in float32.

    Stage 1 in bf16 is BF16_Optimizer's, with float32 gradients of the whole model; stages 2 and 3 keep a part
    (runtime/bf16_optimizer.py, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py).
    """
    stage, width = zero.get("stage", 0), _width(job)
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    bf16 = job.recipe.precision == "bf16"
    share = -(-count // max(job.data_parallel, 1))
    part = share if stage >= 1 else count
    width_of_state = 2 if zero["state_dtype"] == "bfloat16" else 4
    # Float32 under ZeRO is copied too: only stage 0 moves the weights themselves.
    states = {"masters": 4 * part if stage >= 1 or bf16 else 0, "exp_avg": part * width_of_state}
    states["exp_avg_root"] = -(-second * part // count) * width_of_state
    # Up to stage 1 the micro-batch's own gradients, in bf16, are there until its backward pass ends.
    gradients = 4 * share if stage >= 2 else (6 if bf16 else 4) * count
    host = 0
    if offloaded:
        host = sum(states.values()) + 4 * share
        states = dict.fromkeys(states, 0)
        gradients = 0 if stage >= 2 else gradients
    weights = width * (share if stage == 3 else count)
    if stage == 3 and (zero.get("offload_param") or {}).get("device", "none") != "none":
        host, weights = host + weights, 0
    return {
        "weights": weights,
        "gradients": gradients,
        **states,
        "buffers": _deepspeed_buffers(count, zero, bf16, offloaded),
        "host": host,
    }


def _deepspeed_buffers(count: int, zero: Mapping[str, Any], bf16: bool, offloaded: bool) -> int:
    stage = zero.get("stage", 0)
    if stage == 0 or (stage == 1 and bf16 and not offloaded):
        return 0
    # Allocated as large as the file says, however small the model is.
    bucket = int(zero.get("reduce_bucket_size", 500_000_000)) * bool(zero.get("contiguous_gradients", True))
    if stage == 3:
        gathered = min(count, int(zero.get("stage3_max_live_parameters", 1_000_000_000)))
        return 4 * bucket + (2 if bf16 else 4) * gathered
    # Stage 2 keeps them in the model's dtype until they are reduced, stage 1 in the accumulator's.
    return (2 if stage == 2 and bf16 else 4) * bucket * (2 if zero.get("overlap_comm") else 1)


def activations(job: Job, stage: int) -> int:
    """Bytes that stage ``stage`` keeps for its backward passes, when it keeps most.

    A layer's terms are those of Korthikanti et al. 2022 (arXiv 2205.05198, section 4), without the dropout masks where
    nothing is dropped, and with attention as it is implemented: one that keeps no scores with Transformer Engine, else
    megatron-core 0.19.2's ``DotProductAttention``. In the 1F1B schedule stage i of p has p - i micro-batches on their
    way.
    """
    recipe, layout = job.recipe, job.recipe.layout
    kept, attention = _layer(job)
    if layout.recompute == "full":
        kept, again = _residual(job), kept + attention
    elif layout.recompute == "selective":
        again = attention  # one layer's at a time
    else:
        kept, again = kept + attention, 0
    under_way = min(layout.pipeline - stage, max(microbatches(job), 1))
    held = kept * stage_layers(job)
    if stage == 0:
        mask = _tokens(job) * recipe.model.hidden_size // _sequence_sharers(job) if recipe.model.hidden_dropout else 0
        held += 16 * _tokens(job) + mask  # token and position ids are int64
    total = held * under_way + again
    if stage == layout.pipeline - 1:
        total += 2 * _residual(job)  # the last norm's input, and the output layer's
    return total


def microbatches(job: Job) -> int:
    """Micro-batches of a step, rounded down."""
    return job.recipe.schedule.global_batch_size // (job.micro_batch_size * max(job.data_parallel, 1))


def _layer(job: Job) -> tuple[int, int]:
    """Bytes that a layer keeps of a micro-batch: what its matrices and norms take in, and its attention alone."""
    model, layout, width = job.recipe.model, job.recipe.layout, _width(job)
    tokens, hidden, ffn = _tokens(job), model.hidden_size, model.ffn_size
    shared = width * tokens * (4 * hidden + 2 * ffn) // layout.tensor  # q, k, v, projection in; GELU in and out
    on_each = 4 * width * tokens * hidden  # in: both norms, the matrices behind them
    if model.hidden_dropout:
        on_each += 2 * tokens * hidden
    heads = max(model.num_attention_heads // layout.tensor, 1)
    if job.cluster.transformer_engine and not job.rehearsed:
        attention = 4 * heads * tokens  # the softmax's logarithms
    else:
        scores = heads * tokens * model.seq_length // layout.context
        attention = scores * width  # the softmax
        if model.attention_dropout:
            attention += scores * (1 + width)  # the mask, and what it leaves
    return shared + on_each // _sequence_sharers(job), attention


def _logits(job: Job) -> int:
    """Logits in the model's dtype and in float32, and so again their gradients (core/tensor_parallel/cross_entropy.py
    of megatron-core 0.19.2 works in place; a float32 model has them once)."""
    return (
        (6 if job.recipe.precision == "bf16" else 4) * _tokens(job) * padded_vocabulary(job) // job.recipe.layout.tensor
    )


def _residual(job: Job) -> int:
    """Bytes of a micro-batch between two layers."""
    return _width(job) * _tokens(job) * job.recipe.model.hidden_size // _sequence_sharers(job)


def _tokens(job: Job) -> int:
    """Tokens of a micro-batch on a rank."""
    return job.micro_batch_size * job.recipe.model.seq_length // job.recipe.layout.context


def _sequence_sharers(job: Job) -> int:
    layout = job.recipe.layout
    return layout.tensor if layout.sequence_parallel else 1


def _with_second_state(job: Job, count: int, stage: int) -> int:
    """Of ``count`` weights of a tensor rank those that have a second state."""
    chosen = job.recipe.optimizer
    if not isinstance(chosen, OwnOptimizer):
        return count
    if not chosen.spec.beside:
        return count if NAMES[1] in chosen.spec.state else 0
    # Matrices have none, and learned positions are one to Megatron; what moves the rest may.
    rest = registry.find(dict(chosen)["scalar_optimizer"])
    if rest is not None and NAMES[1] not in rest.state:
        return 0
    model = job.recipe.model
    positions = model.seq_length * model.hidden_size if stage == 0 else 0
    return count - stage_layers(job) * _matrices(model) // job.recipe.layout.tensor - positions


def _width(job: Job) -> int:
    """Bytes of a weight or an activation."""
    return 2 if job.recipe.precision == "bf16" else 4
