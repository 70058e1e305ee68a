"""What a relaxed optimizer takes its temperature over under ZeRO 1 and 2: all partitions, without their padding.

Every host symbol named here was read in deepspeed 0.19.8.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s3_megatron.engines.deepspeed.layout import is_flat
from s3_megatron.errors import S3Error
from s3_megatron.optim.relaxed import RelaxedOptimizer


def take_over_all_ranks(engine: Any) -> None:
    """Give the relaxed optimizer of ``engine``, which is complete, what it counts, and when a step ends.

    Raises:
        S3Error: its state lies otherwise than in one flat partition a param group and rank.
    """
    optimizer: RelaxedOptimizer = engine.basic_optimizer
    wrapper, title = engine.optimizer, optimizer.spec.title
    if optimizer.takes_whole_matrices:
        raise S3Error(f"{title} takes whole matrices, which ZeRO flattens and cuts: use it in plain PyTorch or FSDP2")
    if not is_flat(wrapper) or not hasattr(wrapper, "single_partition_of_fp32_groups"):
        raise S3Error(
            f"{title} runs in ZeRO 1 and 2 alone, and this is {type(wrapper).__name__}: set stage 1 or 2, without a "
            "grad_accum_dtype other than the model's"
        )
    if engine.mpu is not None or engine.has_moe_layers:
        raise S3Error(
            f"{title} takes its temperature over data-parallel ranks alone: run it without tensor, pipeline, sequence "
            "and expert parallelism, or in plain PyTorch or Megatron"
        )
    if getattr(wrapper, "torch_autocast_gradscaler", None):
        raise S3Error(f"torch_autocast in float16 skips steps and {title} cannot know: use bfloat16, or fp16.enabled")
    optimizer.counted = _counted(wrapper)
    optimizer.counts_steps_at_rate_0 = optimizer.is_stepped_in_parts = True


def _counted(wrapper: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Make what leaves of a partition's m the elements of weights.

    A group's flat tensor has padding between and behind them; partitions are of one size, in the order of the ranks.
    """
    pieces: dict[Tensor, list[slice]] = {}
    for i, master in enumerate(wrapper.single_partition_of_fp32_groups):
        weights, size = wrapper.round_robin_bit16_groups[i], int(wrapper.partition_size[i])
        gaps = getattr(wrapper, "round_robin_bit16_padding", {i: [0] * len(weights)})[i]  # 0.17.6 has none between
        begin, mine = 0, dist.get_rank(wrapper.real_dp_process_group[i]) * size
        pieces[master] = []
        for weight, gap in zip(weights, gaps, strict=True):
            first, last = (min(max(place - mine, 0), size) for place in (begin, begin + weight.numel()))
            pieces[master].append(slice(first, last))
            begin += weight.numel() + gap
    return lambda master, m: torch.cat([m.reshape(-1)[piece] for piece in pieces[master]])
