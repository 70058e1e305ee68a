"""Feeding ``watch`` from a DeepSpeed engine: what its optimizer holds, and the sizes of its last whole step."""

import weakref
from typing import Any

from torch import Tensor

from s3_megatron.engines.deepspeed.layout import masters
from s3_megatron.engines.deepspeed.stepping import Activity, activity
from s3_megatron.optim import EngineOptimizer
from s3_megatron.watch.part import Part
from s3_megatron.watch.statistics import zeros


def part(engine: Any, kind: str | None = None) -> Part:
    """Describe the optimizer of ``engine`` (a DeepSpeedEngine, 0.19.8) for ``watch.observer.Observer.add``.

    ``kind`` is its name for a person, its type's if None. S3 collects statistics from the next step on.
    """
    optimizer, wrapper = engine.basic_optimizer, engine.optimizer
    held = masters(wrapper)
    copies = 0 if wrapper is optimizer else sum(tensor.numel() * tensor.element_size() for tensor in held)
    steps = None
    if isinstance(optimizer, EngineOptimizer) and optimizer.counts_updates:
        steps = _WholeSteps(activity(engine))
    return Part(
        optimizer,
        kind=kind,
        wrapper=type(wrapper).__name__,
        elements=sum(tensor.numel() for tensor in held),
        # ZeRO-3 leaves a parameter its partition alone.
        model_elements=sum(getattr(param, "ds_numel", param.numel()) for param in engine.module.parameters()),
        master_bytes=copies,
        statistics=steps,
    )


class _WholeSteps:
    """Reads an Activity's statistics and does not keep its engine's state alive."""

    def __init__(self, mine: Activity) -> None:
        mine.watch()
        self._mine = weakref.ref(mine)

    def __call__(self) -> Tensor:
        mine = self._mine()
        return zeros() if mine is None or mine.statistics is None else mine.statistics
