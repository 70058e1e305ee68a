"""Where DeepSpeed's optimizer wrappers keep what S3 moves (deepspeed 0.19.8; imported late, see __init__.py)."""

from typing import Any

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


def has_gradscaler(engine: Any) -> bool:
    """Whether torch.autocast's GradScaler decides about a step, which it does not report (0.19.8)."""
    return bool(
        getattr(engine, "torch_autocast_z0_gradscaler", None)
        or getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    )
