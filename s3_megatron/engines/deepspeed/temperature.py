"""What a relaxed optimizer takes its temperature over under ZeRO: all partitions, without their padding.

Every host symbol named here was read in deepspeed 0.19.8.
"""

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
    if not optimizer.param_groups[0]["transition_iters"]:
        return  # all steps are hard
    if engine.mpu is not None or engine.has_moe_layers:
        raise S3Error(
            f"{title} takes its temperature over data-parallel ranks alone: run it without tensor, pipeline, sequence "
            "and expert parallelism, in plain PyTorch or Megatron, or with soft_start 1, for hard steps alone"
        )
    if is_sharded(wrapper):  # else every rank has the whole model, and counts it
        optimizer.counted = _counted(wrapper)


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


def _of_flat_groups(wrapper: Any) -> Iterator[tuple[Tensor, list[slice]]]:
    """Give the weights' places in each partition of ZeRO 1 and 2."""
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
