"""Where DeepSpeed's optimizer wrappers keep what S3 moves (deepspeed 0.19.8; imported late, see __init__.py)."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor


def is_sharded(wrapper: Any) -> bool:
    """Whether ``wrapper`` is ZeRO's, and not stage 0's."""
    return is_flat(wrapper) or is_stage3(wrapper)


def is_stage3(wrapper: Any) -> bool:
    """Whether ``wrapper`` is ZeRO-3's."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3)


def is_flat(wrapper: Any) -> bool:
    """Whether ``wrapper`` is one of those of ZeRO 1 and 2: a partition of one flat tensor for each param group."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return isinstance(wrapper, DeepSpeedZeroOptimizer | BF16_Optimizer)


def masters(wrapper: Any) -> list[Tensor]:
    """List this rank's tensors that S3 moves, without frozen parameters, which stay in the groups at stage 0.

    ZeRO-3 puts its tensors into the param groups only while it steps.
    """
    if is_stage3(wrapper):
        return list(wrapper.fp32_partitioned_groups_flat)
    return [param for group in wrapper.param_groups for param in group["params"] if param.requires_grad]


def model_groups(wrapper: Any) -> list[list[Tensor]]:
    """Give the model's parameters that ZeRO's ``wrapper`` trains, group by group."""
    names = ("fp16_groups",) if is_stage3(wrapper) else ("bf16_groups", "bit16_groups")
    return next(getattr(wrapper, name) for name in names if hasattr(wrapper, name))


def flat_partitions(wrapper: Any) -> Iterator[tuple[Tensor, dist.ProcessGroup, list[tuple[Tensor, int]]]]:
    """Yield each partition of ZeRO 1 and 2 on this rank, the ranks that have one, and where its group's weights begin.

    A group's flat tensor may have gaps between and padding behind its weights; partitions are of one size, in the order
    of the ranks. A beginning is in elements from the start of this rank's partition, and may lie outside of it.
    """
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        partitions, groups = wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups
    else:  # BF16_Optimizer
        partitions, groups = wrapper.fp32_groups_flat_partition, wrapper.bf16_groups
    for i, master in enumerate(partitions):
        weights, ranks = groups[i], wrapper.real_dp_process_group[i]
        # BF16_Optimizer and 0.17.6 have none between.
        gaps = getattr(wrapper, "round_robin_bit16_padding", {i: [0] * len(weights)})[i]
        first, places = -dist.get_rank(ranks) * master.numel(), []
        for weight, gap in zip(weights, gaps, strict=True):
            places.append((weight, first))
            first += weight.numel() + gap
        yield master, ranks, places


def inside(first: int, count: int, size: int) -> slice:
    """Give what of ``count`` elements from ``first`` on lies in [0, ``size``)."""
    return slice(*(min(max(place, 0), size) for place in (first, first + count)))


def has_gradscaler(engine: Any) -> bool:
    """Whether torch.autocast's GradScaler decides about a step, which it does not report (0.19.8)."""
    return bool(
        getattr(engine, "torch_autocast_z0_gradscaler", None)
        or getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    )
