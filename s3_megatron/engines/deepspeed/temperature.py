"""What a relaxed optimizer takes its temperature over under ZeRO: all partitions, without their padding.

Every host symbol named here was read in deepspeed 0.19.8.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s3_megatron.engines.deepspeed.layout import flat_partitions, has_gradscaler, inside, is_sharded, is_stage3
from s3_megatron.engines.deepspeed.softmuon import ZeroMatrices, lay_out
from s3_megatron.errors import S3Error
from s3_megatron.optim.relaxed import RelaxedOptimizer


def take_over_all_ranks(engine: Any) -> None:
    """Give the relaxed optimizer of ``engine``, which is complete, what it counts, and when a step ends.

    Raises:
        S3Error: a float16 of torch's, or the ranks of ``engine`` do not hold each coordinate equally often.
    """
    optimizer: RelaxedOptimizer = engine.basic_optimizer
    wrapper, title = engine.optimizer, optimizer.spec.title
    if has_gradscaler(engine):
        raise S3Error(f"torch_autocast in float16 skips steps and {title} cannot know: use bfloat16, or fp16.enabled")
    if isinstance(optimizer, ZeroMatrices):
        optimizer.pieces = lay_out(optimizer, wrapper)
    optimizer.counts_steps_at_rate_0 = optimizer.is_stepped_in_parts = True
    optimizer.level_of_begin = logging.WARNING
    if not optimizer.param_groups[0]["transition_iters"]:
        return  # all steps are hard
    with_experts = engine.has_moe_layers and (isinstance(optimizer, ZeroMatrices) or is_stage3(wrapper))
    if engine.mpu is not None or with_experts:
        raise S3Error(
            f"{title} takes its temperature over data-parallel ranks alone: run it without tensor, pipeline and "
            f"sequence parallelism{' and experts' if with_experts else ''}, in plain PyTorch or Megatron, or with "
            "soft_start 1, for hard steps alone"
        )
    if is_sharded(wrapper):
        optimizer.counted = _counted(wrapper)
    elif engine.has_moe_layers:  # else every rank has the whole model, and counts it
        optimizer.counted = _first_copies(engine)


def end_step(engine: Any) -> None:
    """Count a step that ``engine`` has applied; ZeRO-3's groups hold their tensors meanwhile."""
    optimizer: RelaxedOptimizer = engine.basic_optimizer
    if not is_stage3(engine.optimizer):
        optimizer.end_step()
        return
    engine.optimizer._set_fp32_optimizer_param_groups()
    try:
        optimizer.end_step()
    finally:
        engine.optimizer._clear_fp32_optimizer_param_groups()


def _counted(wrapper: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Make what leaves of a partition's m the elements of weights."""
    pieces = dict(_of_stage_3(wrapper) if is_stage3(wrapper) else _of_flat_groups(wrapper))
    return lambda master, m: torch.cat([m.reshape(-1)[piece] for piece in pieces[master]])


def _first_copies(engine: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Make what counts whole weights once: dense ones are on every rank, an expert's on those of a group of its own."""
    names = {
        id(param): group["name"]
        for group in engine.basic_optimizer.param_groups
        for param in (group["params"] if group.get("moe") else ())
    }

    def counted(param: Tensor, m: Tensor) -> Tensor:
        name = names.get(id(param))
        ranks = dist.group.WORLD if name is None else engine.expert_data_parallel_group[name]
        return m if dist.get_rank(ranks) == 0 else m.reshape(-1)[:0]

    return counted


def _of_flat_groups(wrapper: Any) -> Iterator[tuple[Tensor, list[slice]]]:
    """Give the weights' places in each partition of ZeRO 1 and 2; an expert's is one of those of its own ranks."""
    for master, _, places in flat_partitions(wrapper):
        yield master, [inside(first, weight.numel(), master.numel()) for weight, first in places]


def _of_stage_3(wrapper: Any) -> Iterator[tuple[Tensor, list[slice]]]:
    """Give the weights' places in each sub-group of ZeRO-3: a part of every weight, padded behind the last rank's."""
    for master, weights in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True):
        begin, pieces = 0, []
        for weight in weights:
            size = weight.partition_numel()
            left = weight.ds_numel - dist.get_rank(weight.ds_process_group) * size
            pieces.append(slice(begin, begin + min(max(left, 0), size)))
            begin += size
        yield master, pieces
