"""A ``torch.optim.Optimizer`` whose state is known by name, marked in every param group, and keeps its dtype."""

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from s3_megatron.errors import S3Error


class MarkedOptimizer(torch.optim.Optimizer):
    """State in ``state_names`` tensors a parameter, shaped like it; another optimizer's state is refused.

    A subclass has the class attributes, ``check_group`` and a ``step`` that takes a parameter's state from
    ``state_of``.
    """

    title: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    # The entry of every param group that says whose state it is, and what that state is.
    mark: ClassVar[str]
    state_format: ClassVar[str]

    state_dtype: torch.dtype = torch.float32

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        """Mark the param groups; ``defaults`` are those of a group."""
        defaults = {**defaults, self.mark: self.state_format}
        self.check_group(defaults)
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise S3Error for a hyperparameter out of range; a subclass adds its own."""
        lr, weight_decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise S3Error(
                f"lr is a tensor of {lr.numel()} elements: it must be one number; give groups rates of their own"
            )
        # A learning rate on the GPU is not looked at: reading it would synchronise with the device.
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        if not on_device and not 0 <= lr < math.inf:
            raise S3Error(f"lr is {lr}: it must be a finite number >= 0")
        if not 0 <= weight_decay < math.inf:
            raise S3Error(f"weight_decay is {weight_decay}: it must be a finite number >= 0")

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what it does not know, and a copy would lack it.
        return {**super().__getstate__(), "state_dtype": self.state_dtype}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyperparameters."""
        self.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                self.param_groups.pop()
                raise S3Error(
                    f"{self.title} cannot train a parameter of dtype {param.dtype}: it takes real floating-point "
                    "parameters; view a complex parameter as real (torch.view_as_real) or leave it out"
                )

    def allocate_state(self) -> None:
        """Allocate zero state for every parameter that has none; ``step`` does so where there is a gradient.

        State that an engine put there in another dtype is converted to this optimizer's.
        """
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state_of(param)
                for name in self.state_names:
                    state[name] = state[name].to(self._state_dtype(param))

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state, allocated where it is missing.

        Raises:
            S3Error: it is another optimizer's.
        """
        state: dict[str, Tensor] = self.state[param]
        self._check_entry(state, param.shape)
        for name in self.state_names:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=self._state_dtype(param), requires_grad=False)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's own state, in its ``state_dtype``; torch would cast it to the parameter's dtype.

        Hooks come first, and what they return is what is looked at.

        Raises:
            S3Error: another optimizer wrote the state.
        """
        saved: dict[str, Any] = {}

        def keep(_: torch.optim.Optimizer, hooked: dict[str, Any]) -> None:
            self.check_marks(hooked["param_groups"])
            saved.update(hooked)

        # Last of the hooks: torch has looked at nothing yet.
        handle = self.register_load_state_dict_pre_hook(keep)
        self._uncast = saved
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            del self._uncast

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take state and param groups, which torch, pickle and copies bring here, once they are known to be ours.

        Raises:
            S3Error: they are another optimizer's, or a value is out of range; nothing has changed.
        """
        groups, entries = state["param_groups"], state["state"]
        self.check_marks(groups)
        here = self.__dict__.get("param_groups", groups)
        for ours, group in zip(here, groups, strict=True):
            # What an older version did not have yet.
            for name, default in (self.__dict__ | state)["defaults"].items():
                group.setdefault(name, ours.get(name, default))
            group.pop("differentiable", None)  # torch adds it to the defaults of what was loaded
            self.check_group(group)
        for param, entry in entries.items():
            if isinstance(param, Tensor):
                entry.pop("step", None)  # of Megatron's own making: it gives one to every state that it loads
                self._check_entry(entry, param.shape)
        if "_uncast" in self.__dict__:
            self._restore_dtypes(groups, entries)
        super().__setstate__(state)

    def check_marks(self, param_groups: Iterable[dict[str, Any]]) -> None:
        """Raise S3Error unless param groups carry this optimizer's mark."""
        if any(group.get(self.mark) != self.state_format for group in param_groups):
            raise S3Error(
                f"this optimizer state was not written by {self.title} (its param groups lack the mark {self.mark!r}): "
                "start with fresh optimizer state"
            )

    def _check_entry(self, entry: Mapping[str, Any], shape: torch.Size) -> None:
        if entry and entry.keys() != {*self.state_names}:
            raise S3Error(
                f"the state of a parameter of shape {list(shape)} has {', '.join(map(str, entry))}: {self.title}'s is "
                f"{' and '.join(self.state_names)}; start with fresh optimizer state"
            )

    def _state_dtype(self, param: Tensor) -> torch.dtype:
        return torch.float64 if param.dtype == torch.float64 else self.state_dtype

    def _restore_dtypes(self, groups: list[dict[str, Any]], entries: dict[Any, dict[str, Any]]) -> None:
        """Replace states that torch has cast to their parameter's dtype by what was saved, in this optimizer's."""
        indices = chain.from_iterable(group["params"] for group in self._uncast["param_groups"])
        params = chain.from_iterable(group["params"] for group in groups)
        for index, param in zip(indices, params, strict=True):
            source, dtype = self._uncast["state"].get(index, {}), self._state_dtype(param)
            for name in self.state_names:
                if name in source and entries[param][name].dtype != dtype:
                    entries[param][name] = source[name].to(device=param.device, dtype=dtype)
