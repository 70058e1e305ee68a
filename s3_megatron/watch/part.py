"""One torch optimizer that is watched, as far as it can be known from outside."""

import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from s3_megatron.watch.statistics import zeros
from s3_megatron.watch.updates import adam_statistics, local

logger = logging.getLogger(__name__)


class Part:
    """One torch optimizer of this rank: what wraps it, what it holds, and how far its last step moved that.

    It does not keep the optimizer alive.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        kind: str | None = None,
        wrapper: str | None = None,
        elements: int | None = None,
        model_elements: int | None = None,
        master_bytes: int = 0,
        statistics: Callable[[], Tensor] | None = None,
    ) -> None:
        """Describe ``optimizer``; what is not given is taken from it.

        Args:
            optimizer: a torch optimizer. One that has ``update_statistics`` (S3) collects them from the next step on.
            kind: its name, for a person.
            wrapper: the name of what shards it.
            elements: how many weights of this rank it moves.
            model_elements: how many weights its model has, those that it was given if None; a DTensor is a whole one.
            master_bytes: of the copies that it moves instead of the model's weights.
            statistics: returns ``watch.statistics`` of the last step of all it moves, where ``update_statistics`` has
                them of a part.
        """
        held = [param for group in optimizer.param_groups for param in group["params"]]
        self._optimizer = weakref.ref(optimizer)
        self.kind = kind or type(optimizer).__name__
        self.wrapper = wrapper or type(optimizer).__name__
        self.elements = sum(local(param).numel() for param in held) if elements is None else elements
        self.model_elements = sum(param.numel() for param in held) if model_elements is None else model_elements
        self.master_bytes = master_bytes
        self._collected = statistics
        if statistics is None and hasattr(optimizer, "update_statistics"):
            devices = {local(param).device for param in held}
            if len(devices) > 1:
                logger.warning("%s moves weights on %s: its update sizes are not watched", self.kind, devices)
            else:
                optimizer.update_statistics = zeros(device=next(iter(devices), None))

    def statistics(self) -> Tensor:
        """Give ``watch.statistics`` of the last step; of no elements where they are not known."""
        optimizer = self._optimizer()
        if optimizer is None:
            return zeros()
        if self._collected is not None:
            return self._collected()
        if hasattr(optimizer, "update_statistics"):
            collected: Tensor | None = optimizer.update_statistics
            return zeros() if collected is None else collected
        return adam_statistics(optimizer)

    def state_bytes(self) -> int:
        """Count the bytes of its state, without step counters."""
        optimizer = self._optimizer()
        return sum(
            local(tensor).numel() * tensor.element_size()
            for entry in ({} if optimizer is None else optimizer.state).values()
            for name, tensor in entry.items()
            if isinstance(tensor, Tensor) and name != "step"
        )

    @property
    def alive(self) -> bool:
        """Whether the optimizer is still there."""
        return self._optimizer() is not None

    @property
    def lr(self) -> float | None:
        """The rate of its first param group, if it has one."""
        optimizer = self._optimizer()
        return float(optimizer.param_groups[0]["lr"]) if optimizer is not None and optimizer.param_groups else None
