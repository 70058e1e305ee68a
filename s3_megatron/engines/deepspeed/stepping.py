"""Evidence that S3 steps: what it holds, how often it moved all of it, and how far the last time."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s3_megatron.engines.deepspeed import temperature
from s3_megatron.engines.deepspeed.layout import has_gradscaler, masters
from s3_megatron.errors import S3Error
from s3_megatron.kernels.op import choose
from s3_megatron.optim import S3, EngineOptimizer, SoftSignum
from s3_megatron.optim.relaxed import RelaxedOptimizer
from s3_megatron.watch import statistics

_ATTRIBUTE = "s3_activity"  # of the engine


class Activity:
    """What S3, or another optimizer of ours, does in one DeepSpeed engine.

    Attributes:
        title: the optimizer's name.
        elements: weights that this rank moves, alignment padding included.
        steps: how often S3 moved them all.
        statistics: ``watch.statistics`` of the last whole step; None without ``watch``.
    """

    def __init__(self, optimizer: EngineOptimizer, held: list[Tensor]) -> None:
        """Count from now on the elements that ``optimizer`` moves, of those in ``held``."""
        self.elements = sum(tensor.numel() for tensor in held)
        self.steps = 0
        self.moved = 0
        self.statistics: Tensor | None = None
        self._device = held[0].device if held else torch.device("cpu")
        self.title = optimizer.spec.title
        self._optimizer = optimizer
        # ZeRO 1 and 2 call step once a param group, ZeRO-3 once a sub-group.
        optimizer.register_step_post_hook(self._count)

    def watch(self) -> None:
        """Collect ``statistics`` from the next step on."""
        self.statistics = statistics.zeros(device=self._device)
        self._optimizer.update_statistics = torch.zeros_like(self.statistics)

    def begin(self) -> None:
        """Start a step of the engine."""
        self.moved = 0
        if self.statistics is not None:
            self.statistics.zero_()

    def _count(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            self.moved += sum(param.numel() for param in group["params"] if param.grad is not None)
        if self.statistics is not None:
            statistics.merge_(self.statistics, optimizer.update_statistics)


def activity(engine: Any) -> Activity:
    """Give the Activity of a DeepSpeed engine.

    Raises:
        S3Error: the engine trains with another optimizer, or was made before ``register()``.
    """
    found = getattr(engine, _ATTRIBUTE, None)
    if not isinstance(found, Activity):
        raise S3Error(
            "this DeepSpeed engine does not train with S3: call s3_megatron.engines.deepspeed.register() before "
            'deepspeed.initialize, and name {"type": "S3"} in its configuration'
        )
    return found


def start(engine: Any) -> None:
    """Attach an Activity to ``engine``, whose optimizer is complete, and log on rank 0 what the optimizer holds."""
    optimizer: EngineOptimizer = engine.basic_optimizer
    held = masters(engine.optimizer)
    setattr(engine, _ATTRIBUTE, Activity(optimizer, held))
    if engine.global_rank == 0:
        from deepspeed.utils import logger  # not above: see __init__.py

        # DeepSpeed's logger, at a level that it shows: this line is how a user knows what runs.
        logger.warning(_description(engine, optimizer, held))


def _description(engine: Any, optimizer: EngineOptimizer, held: list[Tensor]) -> str:
    model = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
    dtypes = {tensor.dtype for tensor in held}
    device = held[0].device.type if held else "cpu"
    kernel = ""
    if isinstance(optimizer, S3 | SoftSignum):
        taken = frozenset({*dtypes, optimizer.state_dtype})
        name = choose(optimizer.implementation, device, taken, title=optimizer.spec.title)
        kernel = f" with kernel {name}"
    spec, group = optimizer.spec, optimizer.param_groups[0]
    wrapper = f"{type(engine.optimizer).__name__} (ZeRO {int(engine.zero_optimization_stage())})"
    elements = f"{sum(tensor.numel() for tensor in held):,} of {model:,} elements"
    states = " and ".join(spec.state.values())
    return (
        f"{spec.title} active in {wrapper}: this rank updates {len(held)} tensors, {elements}, on {device}{kernel}; "
        f"masters in {_names(dtypes)}, {states} in {_names({optimizer.state_dtype})}; "
        f"{' '.join(f'{key}={group[key]}' for key in spec.state_keys)}"
    )


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def take_model_step(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``DeepSpeedEngine._take_model_step`` (0.19.8): it steps the wrapper, and says whether the step was applied.

    Raises:
        S3Error: DeepSpeed reports a step, and the optimizer did not move all it holds.
    """

    @functools.wraps(original)
    def _take_model_step(self: Any, *args: Any, **kwargs: Any) -> None:
        mine: Activity | None = getattr(self, _ATTRIBUTE, None)
        if mine is None:
            original(self, *args, **kwargs)
            return
        mine.begin()
        original(self, *args, **kwargs)
        if mine.moved:
            mine.steps += 1
        if self.was_step_applied() and isinstance(self.basic_optimizer, RelaxedOptimizer):
            temperature.end_step(self)
        # Without a wrapper, in float32 at stage 0, unused parameters have no gradient.
        wanted = 1 if isinstance(self.optimizer, EngineOptimizer) else mine.elements
        if self.was_step_applied() and mine.moved < wanted and not has_gradscaler(self):
            raise S3Error(
                f"DeepSpeed took a step in which {mine.title} moved {mine.moved:,} of {mine.elements:,} elements: "
                "another optimizer has taken its place, or its param groups were changed; let nothing replace "
                "engine.optimizer"
            )

    return _take_model_step
