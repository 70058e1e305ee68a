"""Saving on a rank whose optimizer holds nothing: a frozen pipeline stage, or a shard that is padding alone.

megatron-core (0.17.1 to 0.19.2) ends there at the first save, by two assertions, with Adam, too.
"""

from collections.abc import Callable
from typing import Any

import numpy
import torch
from megatron.core.optimizer import DistributedOptimizer

STEP = numpy.float32(0.0)  # ours have none; see _put_steps in factory.py


def save_without_state(part: DistributedOptimizer) -> None:
    """Let ``part`` be saved where it holds nothing of all, or of one, of its buffers (replaces methods of it)."""
    original: Callable[[], dict[str, Any]] = part.state_dict
    original_buckets: Callable[[], dict[Any, Any]] = part.get_parameter_state_dp_reshardable

    def lend(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["state"] = state_dict["state"] or {0: {"step": STEP}}

    def state_dict() -> dict[str, Any]:
        """Give the host's dict a step; it takes the common one from the states, and leaves these out."""
        hook = part.optimizer.register_state_dict_post_hook(lend)
        try:
            return original()
        finally:
            hook.remove()

    def get_parameter_state_dp_reshardable() -> dict[Any, Any]:
        """Mark every empty bucket as padding; the host does so around parameters alone."""
        state = original_buckets()
        for index, buffer in enumerate(part.buffers):
            for saved in state[index].values():
                for bucket, entries in zip(buffer.buckets, saved, strict=True):
                    if not entries:
                        names = part.optimizer.spec.state_names
                        entries.append(_padding(bucket, part.data_parallel_group, names))
        return state

    part.state_dict = state_dict
    part.get_parameter_state_dp_reshardable = get_parameter_state_dp_reshardable


def _padding(bucket: Any, group: torch.distributed.ProcessGroup, names: tuple[str, ...]) -> dict[str, Any]:
    """Make the host's entry for this rank's share of ``bucket``, all of it padding.

    What lies between two parameters belongs to the saved tensor, which must have no holes; what lies behind the last
    one does not.
    """
    share = bucket.grad_data.numel() // group.size()
    inside = min(share, bucket.numel_unpadded - group.rank() * share)
    entry = {"gbuf_local_start": 0, "gbuf_local_end": share, "padding": True}
    if inside <= 0:
        return entry
    tensors = {name: torch.zeros(inside, device=bucket.grad_data.device) for name in ("param", *names)}
    return {**entry, **tensors, "gbuf_local_end": inside}
