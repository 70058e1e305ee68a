"""float16 under ZeRO: ranks skip the same steps, and gradients are unscaled by the scale that they were made with."""

import functools
from collections.abc import Callable
from typing import Any

from s3_megatron.swap import SymbolSwap


def grow_after_the_step(wrapper: Any) -> None:
    """Let ``wrapper`` raise its loss scale only when the step is done (deepspeed 0.19.8, ZeRO 1, 2 and 3).

    ``step`` calls ``_update_scale`` before it unscales. Where the scale grows, every ``loss_scale_window`` steps, the
    gradients are then divided by twice their scale, and m and r take up halves. (Clipping, where it binds, hides it;
    the comments of DeepSpeed's pull request 8588 describe it.) An overflow still counts at once: its step is skipped.
    """
    finite = False
    update_scale = wrapper._update_scale

    def hold_back(original: Callable[[bool], None]) -> Callable[[bool], None]:
        @functools.wraps(original)
        def _update_scale(has_overflow: bool = False) -> None:
            nonlocal finite
            finite = not has_overflow
            if has_overflow:
                original(has_overflow)

        return _update_scale

    def step_then_update(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal finite
            finite = False
            result = original(*args, **kwargs)
            if finite:
                update_scale(False)
            return result

        return step

    swap = SymbolSwap("this DeepSpeed")
    swap.replace(wrapper, "_update_scale", hold_back)
    swap.replace(wrapper, "step", step_then_update)


def look_on_every_rank(wrapper: Any) -> None:
    """Let all ranks of ZeRO 1 skip a step in which one saw an infinity or NaN (deepspeed 0.17.6).

    Each looked in its own shard alone: one skipped, the others stepped and waited for its weights.
    """
    SymbolSwap("this DeepSpeed").replace(
        wrapper, "has_overflow", lambda original: lambda partition_gradients: original(partition_gradients=True)
    )
