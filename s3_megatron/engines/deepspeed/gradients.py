"""Every gradient is used in one step: ZeRO-3, and ZeRO 1 and 2 under offload (deepspeed 0.19.8 and 0.17.6)."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.utils import log_dist
from torch import Tensor

from s3_megatron.engines.deepspeed.layout import is_stage3, masters
from s3_megatron.swap import SymbolSwap


def forget_after_the_step(wrapper: Any) -> None:
    """Zero what ZeRO's ``wrapper`` keeps of the gradients: after each step, and where they are thrown away.

    A backward pass overwrites only the gradients of the parameters that it reaches. The others kept their last one, and
    the next step took it again, whatever the optimizer; in an accumulation, a parameter that only a later micro-batch
    reaches added its new gradient to it. ZeRO 1 and 2 without offload keep none: there, and now everywhere, such a
    parameter has a gradient of zero.
    """
    if not is_stage3(wrapper) and not hasattr(wrapper, "accumulated_grads_in_cpu"):
        return
    inside = done = False

    def forget() -> None:
        kept = (
            [wrapper.grad_partitions_flat_buffer] if is_stage3(wrapper) else wrapper.accumulated_grads_in_cpu.values()
        )
        for gradient in (*kept, *(master.grad for master in masters(wrapper))):  # a master's stays under offload
            if gradient is not None:
                gradient.zero_()

    def marked(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside = True
            try:
                return original(*args, **kwargs)
            finally:
                inside = False

        return call

    def step_then_forget(original: Callable[..., Any]) -> Callable[..., Any]:
        host_step = marked(original)

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            result = host_step(*args, **kwargs)
            forget()
            done = True
            return result

        return step

    def zero_and_forget(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def zero_grad(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if not inside:
                if not done:
                    forget()
                done = False  # the engine calls this once after each step
            return original(*args, **kwargs)

        return zero_grad

    swap = SymbolSwap("this DeepSpeed")
    # 0.17.6 calls zero_grad in its own work: after a backward pass (ZeRO 1 and 2), where every gradient under offload
    # was lost, and for each sub-group of a step (ZeRO-3), before the next has taken its gradients.
    swap.replace(wrapper, "independent_gradient_partition_epilogue", marked)
    swap.replace(wrapper, "step", step_then_forget)
    swap.replace(wrapper, "zero_grad", zero_and_forget)


def take_every_micro_batch(wrapper: Any, param_names: Mapping[Tensor, str]) -> None:
    """Let a step of ZeRO's ``wrapper``, 2 or 3 under offload, take what only its earlier micro-batches have reached.

    DeepSpeed copies a gradient to where the offloaded optimizer reads it as the last micro-batch is reduced, if that
    reaches the parameter. What earlier ones had accumulated of the others was lost, whatever the optimizer. 0.19.8 can
    copy it before the step, which it does where a loop decides by itself when to step; 0.17.6 cannot: there one
    warning gives their ``param_names``, which are the engine's, when it happens: its ZeRO-3 has none.
    """
    third = is_stage3(wrapper)
    if third:
        active, finalize = "_offload_boundary_param_ids", "_finalize_offload_gradient_accumulation"
    else:
        active, finalize = "_offload_accumulated_param_ids", "_finalize_cpu_offload_gradient_accumulation"
    if not (
        getattr(wrapper, "offload_optimizer" if third else "cpu_offload", False)
        and getattr(wrapper, "partition_gradients", third)
    ):
        return
    warned = False

    def copy_what_is_left(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal warned
            if hasattr(wrapper, finalize):
                every: set[int] = getattr(wrapper, active)
                left = {_identity(wrapper, param) for param in _without_norm(wrapper)} & every
                if left:
                    setattr(wrapper, active, left)
                    getattr(wrapper, finalize)()
                    setattr(wrapper, active, every)
            elif not warned and (lost := [param for param in _without_norm(wrapper) if _has_gradient(wrapper, param)]):
                warned = True
                names = ", ".join(param_names.get(param, "?") for param in lost)
                log_dist(
                    f"DeepSpeed loses the gradients of {names} in this step: its last micro-batch does not use them, "
                    "and under offload_optimizer ZeRO 2 and 3 of DeepSpeed 0.17 drop what earlier ones gave; use ZeRO "
                    "1, train without offload_optimizer, or take deepspeed 0.19",
                    ranks=[-1],
                    level=logging.WARNING,
                )
            return original(*args, **kwargs)

        return step

    SymbolSwap("this DeepSpeed").replace(wrapper, "step", copy_what_is_left)


def _identity(wrapper: Any, param: Any) -> int:
    """By what DeepSpeed lists ``param`` among those that a backward pass has reached."""
    return int(param.ds_id if is_stage3(wrapper) else wrapper.get_param_id(param))


def _without_norm(wrapper: Any) -> list[Any]:
    """List the parameters whose gradient this rank has not copied: it takes the norm when it does."""
    groups = wrapper.fp16_groups if is_stage3(wrapper) else wrapper.params_in_partition
    norms = wrapper.norm_for_param_grads
    return [param for group in groups for param in group if wrapper.get_param_id(param) not in norms]


def _has_gradient(wrapper: Any, param: Any) -> bool:
    """Whether this step has accumulated one of ``param`` on this rank; zeroed after each step."""
    kept: dict[int, Tensor] = (
        wrapper._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition  # by ds_id
        if is_stage3(wrapper)
        else wrapper.accumulated_grads_in_cpu
    )
    gradient = kept.get(_identity(wrapper, param))
    return gradient is not None and bool(gradient.any())
