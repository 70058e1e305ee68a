"""Schedulers that would write decays into S3's param groups."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from s3_megatron.errors import S3Error
from s3_megatron.optim import EngineOptimizer


def configure_lr_scheduler(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``DeepSpeedEngine._configure_lr_scheduler`` (0.19.8), which builds or takes a scheduler.

    DeepSpeed's OneCycle and torch's OneCycleLR and CyclicLR cycle the first beta as Adam's momentum, unless they are
    asked not to; OneCycle also makes the second one 0.99. S3's update is bounded for one beta alone.

    Raises:
        S3Error: the scheduler of an engine with S3 does so.
    """

    @functools.wraps(original)
    def _configure_lr_scheduler(self: Any, *args: Any) -> None:
        original(self, *args)
        if not isinstance(self.basic_optimizer, EngineOptimizer):
            return
        for scheduler in _parts(self.lr_scheduler):
            if getattr(scheduler, "cycle_momentum", False):
                raise S3Error(
                    f"the scheduler {type(scheduler).__name__} has cycle_momentum on and writes betas that "
                    "differ into S3's param groups, with which a weight can move by more than the rate: "
                    "give it cycle_momentum=False (false in the JSON); it then cycles the rate alone"
                )

    return _configure_lr_scheduler


def _parts(scheduler: Any) -> Iterator[Any]:
    """Yield ``scheduler`` and those in it: torch's ChainedScheduler and SequentialLR, accelerate's wrappers."""
    yield scheduler
    for part in (*getattr(scheduler, "_schedulers", ()), getattr(scheduler, "scheduler", None)):
        if part is not None:
            yield from _parts(part)
