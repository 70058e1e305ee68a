"""What a relaxed optimizer takes its temperature over in Megatron: every rank of the model, each coordinate once."""

import functools

import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.optim.relaxed import RelaxedOptimizer


def take_over_all_ranks(optimizer: MegatronOptimizer, kind: type[RelaxedOptimizer]) -> None:
    """Give the relaxed optimizer in ``optimizer`` its ranks, and what it counts; the ranks talk.

    Raises:
        S3Error: on all ranks, where the optimizer takes whole matrices, or one of them has several such optimizers or
            none.
    """
    if kind.takes_whole_matrices:
        raise S3Error(
            f"{kind.spec.title} takes whole matrices, which the distributed optimizer cuts: use it in plain PyTorch or "
            "FSDP2"
        )
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    # Over these Megatron adds up the gradient's norm, which has every coordinate once, too. A stub has them as well.
    group = parts[0].get_grad_stats_parallel_group()
    held = [part for part in parts if not getattr(part, "is_stub_optimizer", False)]
    counts = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, len(held), group=group)
    inner = held[0].optimizer if held else None
    if inner is not None and not inner.param_groups[0]["transition_iters"]:
        return  # all steps are hard
    if {*counts} != {1}:
        raise S3Error(
            f"Megatron makes {' or '.join(map(str, sorted({*counts})))} optimizers a rank of this model (experts and "
            "--overlap-param-gather-with-optimizer-step add some, a frozen pipeline stage has none), and the "
            "temperature is taken over one on every rank: give soft_start 1, for hard steps alone"
        )
    assert isinstance(inner, RelaxedOptimizer)
    inner.process_group = group
    inner.counted = functools.partial(_counted, held[0])
    # The host calls for no step that is none, and a warm-up begins at rate 0.
    inner.counts_steps_at_rate_0 = True


def _counted(part: MegatronOptimizer, param: Tensor, m: Tensor) -> Tensor:
    """Return ``m``, or nothing of it where another rank has the same weight: the host's rule for the gradient's norm.

    The rule is ``MegatronOptimizer._filter_grads_for_norm``'s (megatron-core 0.19.2; up to 0.18
    ``get_main_grads_for_grad_norm``'s). A shard has no padding.
    """
    is_first = param_is_not_shared(param) and tensor_parallel.param_is_not_tensor_parallel_duplicate(
        param, tp_group=getattr(part, "tp_group", None)
    )
    # Generalized tensor parallelism is 0.19's.
    if is_first and hasattr(tensor_parallel, "param_is_not_gtp_duplicate"):
        is_first = tensor_parallel.param_is_not_gtp_duplicate(param)
    return m if is_first else m.reshape(-1)[:0]
