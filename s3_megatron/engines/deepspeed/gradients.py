"""No gradient is used in two steps: ZeRO-3, and ZeRO 1 and 2 under offload (deepspeed 0.19.8 and 0.17.6)."""

import functools
from collections.abc import Callable
from typing import Any

from s3_megatron.engines.deepspeed.layout import is_stage3, masters
from s3_megatron.engines.swap import SymbolSwap


def forget_after_the_step(wrapper: Any) -> None:
    """Zero what ZeRO's ``wrapper`` keeps of the gradients: after each step, and where they are thrown away.

    A backward pass overwrites only the gradients of the parameters that it reaches. The others kept their last one, and
    the next step took it again, whatever the optimizer; in an accumulation, a parameter that only a later micro-batch
    reaches added its new gradient to it. ZeRO 1 and 2 without offload keep none: there, and now everywhere, such a
    parameter has a gradient of zero.
    """
    if not is_stage3(wrapper) and not hasattr(wrapper, "accumulated_grads_in_cpu"):
        return
    stepping = done = False

    def forget() -> None:
        kept = (
            [wrapper.grad_partitions_flat_buffer] if is_stage3(wrapper) else wrapper.accumulated_grads_in_cpu.values()
        )
        for gradient in (*kept, *(master.grad for master in masters(wrapper))):  # a master's stays under offload
            if gradient is not None:
                gradient.zero_()

    def step_then_forget(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal stepping, done
            stepping = True  # 0.17.6 calls zero_grad for every sub-group, before the next has taken its gradients
            try:
                result = original(*args, **kwargs)
            finally:
                stepping = False
            forget()
            done = True
            return result

        return step

    def zero_and_forget(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def zero_grad(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if not stepping:
                if not done:
                    forget()
                done = False  # the engine calls this once after each step
            return original(*args, **kwargs)

        return zero_grad

    swap = SymbolSwap("this DeepSpeed")
    swap.replace(wrapper, "step", step_then_forget)
    swap.replace(wrapper, "zero_grad", zero_and_forget)
