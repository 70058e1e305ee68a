"""What a relaxed optimizer takes its temperature over in Megatron: every rank of the model, each coordinate once."""

from collections.abc import Callable

import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.optim.relaxed import RelaxedOptimizer


def take_over_all_ranks(
    parts: list[MegatronOptimizer], group: dist.ProcessGroup, counted: Callable[[Tensor, Tensor], Tensor] | None
) -> None:
    """Give the relaxed optimizer in ``parts`` its ranks, and what it counts; the ranks talk.

    Args:
        parts: all that have such an optimizer on this rank, without stubs.
        group: the ranks of the model.
        counted: as RelaxedOptimizer's; None: it has one.

    Raises:
        S3Error: on all ranks, where one of them has several such optimizers or none.
    """
    counts = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, len(parts), group=group)
    inner = parts[0].optimizer if parts else None
    if inner is not None and not inner.param_groups[0]["transition_iters"]:
        return  # all steps are hard
    if {*counts} != {1}:
        raise S3Error(
            f"Megatron makes {' or '.join(map(str, sorted({*counts})))} optimizers a rank of this model (experts and "
            "--overlap-param-gather-with-optimizer-step add some, a frozen pipeline stage has none), and the "
            "temperature is taken over one on every rank: give soft_start 1, for hard steps alone"
        )
    assert isinstance(inner, RelaxedOptimizer)
    inner.process_group, inner.counted = group, counted or inner.counted
    # The host calls for no step that is none, and a warm-up begins at rate 0.
    inner.counts_steps_at_rate_0 = True


def counted_once(part: MegatronOptimizer) -> Callable[[Tensor, Tensor], Tensor]:
    """Make what counts the shards of ``part``, which have no padding: nothing of a weight that another rank counts."""
    tp_group, expert_tp_group = (getattr(part, name, None) for name in ("tp_group", "expert_tp_group"))
    return lambda param, m: m if is_counted(param, tp_group, expert_tp_group) else m.reshape(-1)[:0]


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
