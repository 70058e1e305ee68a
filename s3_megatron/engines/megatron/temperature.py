"""What relaxed optimizers take their temperature over in Megatron: every rank of the model, each coordinate once."""

import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from s3_megatron.optim.relaxed import RelaxedOptimizer


def take_over_all_ranks(optimizer: MegatronOptimizer, parts: list[MegatronOptimizer], chunk: Any) -> None:
    """Let the relaxed optimizers in ``parts`` step as one, over all ranks of the model (replaces a method).

    Megatron (0.17.1 to 0.19.2) makes as many on every rank, also where they hold nothing: one for dense weights, one
    for experts whose data-parallel ranks are others, one more for --overlap-param-gather-with-optimizer-step.

    Args:
        optimizer: what Megatron steps.
        parts: what of it has an optimizer of one Spec, without stubs.
        chunk: a part of the model, in Megatron's DDP, which has the data-parallel groups.
    """
    inner: list[RelaxedOptimizer] = [part.optimizer for part in parts]
    if not inner or not inner[0].param_groups[0]["transition_iters"]:
        return  # all steps are hard
    group, has_copies = _ranks(parts)
    for part, each in zip(parts, inner, strict=True):
        each.process_group, each.counted = group, each.counted or _counted(part, chunk if has_copies else None)
        # The host calls for no step that is none, and a warm-up begins at rate 0.
        each.counts_steps_at_rate_0 = each.is_stepped_in_parts = True
        each.level_of_begin = logging.WARNING
    step: Callable[[], bool] = optimizer.step_with_ready_grads

    def step_with_ready_grads() -> bool:
        success = step()
        inner[0].end_step(*inner[1:])
        return success

    optimizer.step_with_ready_grads = step_with_ready_grads


def _ranks(parts: list[MegatronOptimizer]) -> tuple[dist.ProcessGroup, bool]:
    """Give the ranks that have the model, and whether several data-parallel ones have the same weights."""
    part, everywhere = parts[0], dist.group.WORLD
    assert everywhere is not None, "Megatron has started"
    # SoftMuon knows what it counts; beside it, in the layer-wise optimizer, each weight is whole on one rank.
    in_layer_wise = getattr(part.config, "use_layer_wise_distributed_optimizer", False)
    if part.optimizer.counted is not None or (in_layer_wise and not isinstance(part, DistributedOptimizer)):
        return everywhere, False
    # Over these Megatron adds up the gradient's norm, which has every coordinate once, too.
    groups = [each.get_grad_stats_parallel_group() for each in parts]
    return (groups[0], False) if all(group == groups[0] for group in groups) else (everywhere, True)


def _counted(part: MegatronOptimizer, chunk: Any | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Make what counts the shards of ``part``, which have no padding: nothing of a weight that another rank counts.

    ``chunk`` says, where it is given, which data-parallel ranks have the same weights.
    """
    for group in part.param_groups:
        for param in group["params"] if group["is_expert_parallel"] else ():
            param.allreduce = False  # float32 copies have it since 0.19
    tp_group = getattr(part, "tp_group", None)
    # 0.17 and 0.18 take an expert's norm over tp_group, too.
    expert_tp_group = getattr(part, "expert_tp_group", None) or parallel_state.get_expert_tensor_parallel_group()

    def counted(param: Tensor, m: Tensor) -> Tensor:
        is_first = is_counted(param, tp_group, expert_tp_group)
        if chunk is not None:
            copies = chunk.dp_cp_group if getattr(param, "allreduce", True) else chunk.expt_dp_group
            is_first = is_first and copies.rank() == 0
        return m if is_first else m.reshape(-1)[:0]

    return counted


def is_counted(param: Tensor, tp_group: dist.ProcessGroup | None, expert_tp_group: dist.ProcessGroup | None) -> bool:
    """Whether no model-parallel rank before this one has the same weight: the host's rule for the gradient's norm.

    The rule is ``MegatronOptimizer._filter_grads_for_norm``'s (megatron-core 0.19.2; up to 0.18
    ``get_main_grads_for_grad_norm``'s).
    """
    if not getattr(param, "allreduce", True) and expert_tp_group is not None:
        tp_group = expert_tp_group
    is_first = param_is_not_shared(param) and tensor_parallel.param_is_not_tensor_parallel_duplicate(
        param, tp_group=tp_group
    )
    # Generalized tensor parallelism is 0.19's.
    if is_first and hasattr(tensor_parallel, "param_is_not_gtp_duplicate"):
        is_first = tensor_parallel.param_is_not_gtp_duplicate(param)
    return bool(is_first)
