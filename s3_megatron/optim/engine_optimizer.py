"""What the engines need of an optimizer, and nothing more."""

import functools
import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels.call import Step
from s3_megatron.kernels.formats import FORMATS, Format
from s3_megatron.machine import is_first_rank
from s3_megatron.optim.spec import LR, Spec
from s3_megatron.optim.state import accept, check_entry, check_groups

logger = logging.getLogger(__name__)


class EngineOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that the engines can shard: its state is known by name, marked, and keeps its dtype.

    A subclass has a ``spec``, an ``__init__`` that hands its defaults on, and a ``step``, which takes each parameter's
    state from ``state_of``.

    Raises:
        S3Error: (a ValueError) for a hyperparameter out of range, a parameter that is not real and floating, or a
            loaded state of another optimizer.
    """

    spec: ClassVar[Spec]

    # Whether ``step`` obeys the two below; else the hosts do that work themselves.
    single_pass: ClassVar[bool] = False
    # What an engine has for the next step alone, which takes it from here: a factor of the gradients (torch's fused
    # optimizers divide by a ``grad_scale``), a flag to do nothing, the model's copies to write.
    next_step: Step | None = None
    # Over the last step, where ``watch.statistics.zeros`` were put here, on the weights' device; not every class does.
    update_statistics: Tensor | None = None
    counts_updates: ClassVar[bool] = False

    state_dtype: torch.dtype = torch.float32
    # What a copy keeps beside torch's own.
    _kept: ClassVar[tuple[str, ...]] = ("state_dtype",)

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        """Mark the param groups; ``defaults`` are those of a group."""
        defaults = {**defaults, self.spec.mark: self.spec.state_format}
        self.check_group(defaults)
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise S3Error for a hyperparameter out of range; a subclass adds what its Spec cannot know."""
        check_hyperparameters(self.spec, group)

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what it does not know, and a copy would lack it.
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def refuse_capture(self, advice: str) -> None:
        """Raise S3Error while a CUDA graph captures a step whose numbers are the host's: replays would repeat them."""
        if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
            return
        if torch.cuda.is_current_stream_capturing():
            raise S3Error(
                f"a CUDA graph captures a step of {self.spec.title}, and would repeat its rate for ever: {advice}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyperparameters."""
        self.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        for param in added["params"]:
            if not param.is_floating_point():
                self.param_groups.pop()
                raise S3Error(
                    f"{self.spec.title} cannot train a parameter of dtype {param.dtype}: it takes real floating-point "
                    "parameters; view a complex parameter as real (torch.view_as_real) or leave it out"
                )
        if added.get("rounding_seed") is not None:
            # Groups must not share their noise.
            added["rounding_seed"] += (len(self.param_groups) - 1) << 40

    def allocate_state(self) -> None:
        """Allocate zero state for every parameter that has none; ``step`` does so where there is a gradient.

        State that an engine put there in another dtype is converted to this optimizer's.
        """
        for group in self.param_groups:
            for param in group["params"]:
                state, format = self.state_of(param), self._format(param)
                names = self.spec_of(param).state_names
                stored = [state[name] for name in names]
                # Columns of a format beyond the optimizer's states are not there.
                if any(x.dtype != dtype for x, dtype in zip(stored, format.columns.values(), strict=False)):
                    state.update(zip(names, format.from_full(stored), strict=True))

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """Give a parameter's state, allocated where it is missing.

        Raises:
            S3Error: it is another optimizer's.
        """
        state: dict[str, Tensor] = self.state[param]
        spec, format = self.spec_of(param), self._format(param)
        check_entry(state, param.shape, spec)
        for name, kind in zip(spec.state_names, format.columns, strict=False):
            if name not in state:
                state[name] = format.allocate(kind, param)
        return state

    def spec_of(self, param: Tensor) -> Spec:
        """Give the Spec of a parameter's state: an optimizer that has another one in it has that one's for some."""
        return self.spec

    @property
    def format(self) -> str:
        """The name of the states' format; float64 parameters have theirs."""
        return str(self.state_dtype).removeprefix("torch.")

    def _format(self, param: Tensor) -> Format:
        return FORMATS["float64" if param.dtype == torch.float64 else self.format]

    def state_dict(self) -> dict[str, Any]:
        """Return param groups and state, which is such that every format of states loads it."""
        found: dict[str, Any] = super().state_dict()
        for index, param in _by_index(found, self.param_groups):
            entry, names = found["state"].get(index, {}), self.spec_of(param).state_names
            if entry.keys() >= {*names}:
                stored = [entry[name] for name in names]
                full = self._format(param).to_full(stored)
                if any(a is not b for a, b in zip(stored, full, strict=True)):
                    found["state"][index] = {**entry, **dict(zip(names, full, strict=True))}
        return found

    def go_on_from(self, groups: list[dict[str, Any]]) -> None:
        """Let what is this run's own count in loaded param ``groups`` (modified in place), past ``load_state_dict``."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's own state, in its ``state_dtype``; torch would cast it to the parameter's dtype.

        Hooks come first, and what they return is what is looked at. As with torch's optimizers the saved
        hyperparameters count: where those that define the state differ from this optimizer's, one line says so.

        Raises:
            S3Error: another optimizer wrote the state (an Adam checkpoint has the same names and another meaning).
        """
        saved: dict[str, Any] = {}

        def keep(_: torch.optim.Optimizer, hooked: dict[str, Any]) -> None:
            check_groups(hooked["param_groups"], self.spec)
            if len(hooked["param_groups"]) == len(self.param_groups):  # torch refuses others
                accept(hooked["param_groups"], self.param_groups, self.spec, warn_of_change)
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
        check_groups(groups, self.spec)
        here = self.__dict__.get("param_groups", groups)
        for ours, group in zip(here, groups, strict=True):
            # What an older version did not have yet.
            for name, default in (self.__dict__ | state)["defaults"].items():
                group.setdefault(name, ours.get(name, default))
            group.pop("differentiable", None)  # torch adds it to the defaults of what was loaded
            self.check_group(group)
        for param, entry in entries.items():
            if isinstance(param, Tensor):
                check_entry(entry, param.shape, self.spec_of(param), marked=True)
                if isinstance(entry.get("step"), Tensor):
                    del entry["step"]  # of an Adam whose state was converted, or of Megatron's own making
        if "_uncast" in self.__dict__:
            self._restore_dtypes(groups, entries)
        super().__setstate__(state)

    def _restore_dtypes(self, groups: list[dict[str, Any]], entries: dict[Any, dict[str, Any]]) -> None:
        """Replace states that torch has cast to their parameter's dtype by what was saved, in this optimizer's."""
        for index, param in _by_index(self._uncast, groups):
            source, names = self._uncast["state"].get(index, {}), self.spec_of(param).state_names
            if source.keys() >= {*names}:
                stored = self._format(param).from_full([source[name].to(param.device) for name in names])
                entries[param].update(zip(names, stored, strict=True))


def _by_index(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> Iterator[tuple[int, Tensor]]:
    """Yield each parameter of ``groups`` with its number in a state dict."""
    indices, params = (chain.from_iterable(x["params"] for x in each) for each in (state_dict["param_groups"], groups))
    return zip(indices, params, strict=True)


def check_rounding(state_dtype: torch.dtype, rounding_seed: int | None) -> None:
    """Raise S3Error for a dtype that states cannot have, or noise for states that are not rounded."""
    names = [f"torch.{name}" for name in FORMATS if name != "float64"]
    if str(state_dtype) not in names:
        raise S3Error(f"state_dtype is {state_dtype}: it must be {' or '.join(names)}")
    if rounding_seed is not None and state_dtype != torch.bfloat16:
        raise S3Error("rounding_seed is for state_dtype=torch.bfloat16: float32 states are not rounded")


def check_hyperparameters(spec: Spec, group: dict[str, Any]) -> None:
    """Raise S3Error for a value out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise S3Error(
                f"lr is a tensor of {lr.numel()} elements: it must be one number; give groups rates of their own"
            )
        # A learning rate on the GPU is not looked at: reading it would synchronise with the device.
        if lr.device.type == "cpu":
            LR.check(lr, "lr")
    spec.check({name: value for name, value in group.items() if not (name == "lr" and isinstance(value, Tensor))})


def warn_of_change(what: str) -> bool:
    """Log, on rank 0 and each text once, that the saved hyperparameters count; returns that ours do not."""
    if is_first_rank():
        _warn(f"{what}: the saved values count; write others into param_groups after loading, if they are meant")
    return False


@functools.cache
def _warn(text: str) -> None:
    logger.warning(text)
