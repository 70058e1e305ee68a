"""What SoftSignum shares with its like: hard steps, then soft ones, and the temperature in between."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.errors import S3Error
from s3_megatron.machine import is_first_rank
from s3_megatron.optim.engine_optimizer import EngineOptimizer
from s3_megatron.optim.state import check_groups
from s3_megatron.optim.temperature import Schedule, phases

logger = logging.getLogger(__name__)

# How the run is to be relaxed.
PLAN = ("sign_iters", "transition_iters", "eps", "tmax")
# The six numbers of the schedule, by their names in the param groups. Each in a place of its own, and of one type from
# the start: torch's full_state_dict takes a tuple apart, and cannot load it where there is a None.
SCHEDULE = {
    "mu": "soft_mu",
    "sigma": "soft_sigma",
    "eps": "eps",
    "first": "soft_first",
    "length": "soft_length",
    "map": "soft_map",
}
# What all param groups share.
OF_THE_RUN = (*PLAN, "steps_taken", *(key for key in SCHEDULE.values() if key not in PLAN))


class RelaxedOptimizer(EngineOptimizer):
    """An optimizer that is hard for ``sign_iters`` steps and soft for ``transition_iters``.

    Its phases, its temperatures and the number of the step lie in every param group, and so in checkpoints. A step at
    rate 0 in every group does not count: torch's checkpoint functions take one, on some ranks, to allocate state.

    A subclass has a ``spec``, the ``soft_map``, ``step_group`` or ``step_groups``, and ``measure``.
    """

    soft_map: ClassVar[str]  # a key of temperature.REACHES
    of_the_run: ClassVar[tuple[str, ...]] = OF_THE_RUN
    _kept: ClassVar[tuple[str, ...]] = ("state_dtype", "_asked")

    # The ranks that hold the model. Copies do not keep it.
    process_group: dist.ProcessGroup | None = None
    # For engines whose tensors do not show it: what this rank counts of a parameter's state, as that lies here, for
    # the temperature: the state itself, a part of it without padding, or an empty one where another rank counts it.
    counted: Callable[[Tensor, Tensor], Tensor] | None = None
    # For engines that call for no step but the run's.
    counts_steps_at_rate_0: bool = False
    # For engines that make one step of the run of several calls, of one optimizer or of several, and call ``end_step``
    # behind the last.
    is_stepped_in_parts: bool = False
    # For engines whose log hides INFO: the level of the line where a soft phase begins.
    level_of_begin: int = logging.INFO

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        process_group: dist.ProcessGroup | None,
        **asked: Any,
    ) -> None:
        """Put the run's own entries into the param groups; ``asked`` are the arguments of ``phases``, eps and tmax."""
        self.process_group = process_group
        self._asked = asked
        hard, soft = phases(**{name: value for name, value in asked.items() if name not in ("eps", "tmax")})
        if soft and process_group is not None and dist.get_rank(process_group) < 0:
            raise S3Error("this rank is not in process_group: give the group of all ranks that hold the model")
        run = {
            "sign_iters": int(hard),  # numpy's could not be loaded with weights_only
            "transition_iters": int(soft),
            "eps": asked["eps"],
            "tmax": asked["tmax"],
            "steps_taken": 0,
            "soft_mu": 0.0,
            "soft_sigma": 0.0,
            "soft_first": -1,
            "soft_length": 0,
            "soft_map": self.soft_map,
        }
        super().__init__(params, {**defaults, **run})

    def step_group(self, group: dict[str, Any], tau: float) -> None:
        """Move a group's parameters that have a gradient, by the temperature ``tau``; infinity is a hard step."""
        raise NotImplementedError

    def step_groups(self, tau: float) -> None:
        """Move all groups' parameters, as ``step_group`` does."""
        for group in self.param_groups:
            self.step_group(group, tau)

    def measure(self, *others: Self) -> tuple[float, float]:
        """Return mu and sigma of the whole model's momentum; ``others`` have the rest of it on this rank."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyperparameters; the phases are the whole run's."""
        # ZeroRedundancyOptimizer gives every group what it gives the optimizer itself.
        shared = param_group.keys() & {*self.of_the_run, *self._asked}
        own = sorted(name for name in shared if param_group[name] != self._asked.get(name))
        if own:
            raise S3Error(f"a param group has {', '.join(own)}: that is the whole run's; give it to {self.spec.title}")
        super().add_param_group({name: value for name, value in param_group.items() if name not in shared})
        added = self.param_groups[-1]
        added.update({name: self.param_groups[0][name] for name in self.of_the_run})
        try:
            for param in added["params"]:
                self._check_mesh(param)
        except S3Error:
            self.param_groups.pop()
            raise

    def _check_mesh(self, param: Tensor) -> None:
        if self.process_group is not None or not isinstance(param, DTensor):
            return
        ranks, own = dist.get_world_size(), param.device_mesh.size()
        if own != ranks and self.param_groups[0]["transition_iters"]:
            raise S3Error(
                f"a weight of shape {list(param.shape)} is on {own} of {ranks} ranks: give process_group, the ranks "
                "that hold the model, over which the temperature is taken"
            )

    @property
    def ranks(self) -> dist.ProcessGroup | None:
        """The ranks that the temperature is taken over; None: this process alone."""
        if self.process_group is None and dist.is_available() and dist.is_initialized():
            return dist.group.WORLD
        return self.process_group

    @property
    def schedule(self) -> Schedule | None:
        """What every temperature follows from; None before the soft phase."""
        run = self.param_groups[0]
        return None if run["soft_first"] < 0 else Schedule(**{name: run[key] for name, key in SCHEDULE.items()})

    @property
    def tau(self) -> float:
        """The temperature of the step to come; infinity is a hard one."""
        run, schedule = self.param_groups[0], self.schedule
        if schedule is not None:
            return schedule.tau(run["steps_taken"], run["tmax"])
        # The quantile at 0 is 0, so the first soft step needs no median: it is known when the next one begins.
        return float(run["tmax"]) if self._is_soft() else math.inf

    def _is_soft(self) -> bool:
        run = self.param_groups[0]
        return bool(run["transition_iters"]) and run["steps_taken"] >= run["sign_iters"]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient; returns the closure's loss, if one is given."""
        self.refuse_capture("leave the optimizer's step out of the graph, for its temperature changes with every step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    # Compiled code calls it as it is: another number in every step, and at one of them talk with other ranks. Not step
    # itself: torch hooks it, and up to 2.10 then calls what was disabled there without its object.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self) -> None:
        # ZeroRedundancyOptimizer writes state and groups into the optimizer that it wraps, past every method.
        check_groups(self.param_groups, self.spec)
        if self.update_statistics is not None:
            self.update_statistics.zero_()
        found_inf = None if self.next_step is None else self.next_step.found_inf
        if found_inf is not None and found_inf.item():  # read, for the schedule is kept on the host, and stands still
            self.next_step = None
            return
        self.step_groups(self.tau)
        if not self.is_stepped_in_parts:
            self.end_step()

    @torch.no_grad()
    def end_step(self, *others: Self) -> None:
        """Count a step of the run; where the soft phase begins, take its schedule, which communicates.

        ``others`` have the rest of this rank's weights, the same plan, and made the same step.
        """
        together = (self, *others)
        if not self.counts_steps_at_rate_0 and all(_is_zero(group) for each in together for group in each.param_groups):
            return
        run = self.param_groups[0]
        if self._is_soft() and self.schedule is None:
            first, length = run["steps_taken"], max(run["sign_iters"] + run["transition_iters"] - run["steps_taken"], 1)
            mu, sigma = self.measure(*others)
            if not (math.isfinite(mu) and math.isfinite(sigma)):
                raise S3Error(
                    f"the median of the momentum is {mu}, of its deviation {sigma}: the soft phase cannot begin; "
                    "resume from a checkpoint whose state is finite"
                )
            schedule = Schedule(mu, sigma, run["eps"], first, length, self.soft_map)
            self._log_begin(schedule, run["tmax"])
            for each in together:
                each.write_to_groups(**{key: getattr(schedule, name) for name, key in SCHEDULE.items()})
        taken = run["steps_taken"] + 1
        for each in together:
            each.write_to_groups(steps_taken=taken)

    def _log_begin(self, schedule: Schedule, tmax: float) -> None:
        title, length, last = self.spec.title, schedule.length, schedule.tau(schedule.first + schedule.length, tmax)
        if last == tmax > 1 < length:
            log_on_first_rank(
                logging.WARNING,
                f"{title}'s soft phase of {length} steps keeps its first temperature, {tmax:g}: the momentum has the "
                f"median {schedule.mu:g} and the deviation {schedule.sigma:g}; leave out weights without gradients, or "
                "raise tmax",
            )
            return
        log_on_first_rank(
            self.level_of_begin,
            f"{title} is soft from step {schedule.first + 1} on, for {length} steps, down to a tau of {last:.4g}: the "
            f"momentum has the median {schedule.mu:.4g} and the deviation {schedule.sigma:.4g}",
        )

    def write_to_groups(self, **values: Any) -> None:
        """Give every param group the same values."""
        for group in self.param_groups:
            group.update(values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take state and param groups; before the soft phase this optimizer's own phases, eps and tmax count."""
        here = self.__dict__.get("param_groups")
        plan = {} if here is None else {name: here[0][name] for name in PLAN}
        super().__setstate__(state)
        self._keep_plan(self.param_groups, plan)

    def go_on_from(self, groups: list[dict[str, Any]]) -> None:
        """Let this run's plan count in loaded ``groups`` (modified in place), unless their soft phase has begun."""
        self._keep_plan(groups, {name: self.param_groups[0][name] for name in PLAN})

    def _keep_plan(self, groups: list[dict[str, Any]], plan: dict[str, Any]) -> None:
        run = groups[0]
        changes = ", ".join(f"{name}={value}" for name, value in plan.items() if run[name] != value)
        if not changes:
            return
        if run["soft_first"] >= 0:
            log_on_first_rank(
                logging.WARNING,
                f"the state was saved in its soft phase, which goes on as it began, {run['soft_length']} steps from "
                f"step {run['soft_first']}: {changes} of this run does not count",
            )
            return
        before = ", ".join(f"{name}={run[name]}" for name in plan if run[name] != plan[name])
        log_on_first_rank(
            logging.WARNING,
            f"the state was saved in its hard phase, at step {run['steps_taken']}, by a run with {before}: {changes} "
            "of this run counts",
        )
        for group in groups:
            group.update(plan)


def log_on_first_rank(level: int, line: str) -> None:
    """Log a line once a job."""
    if is_first_rank():
        logger.log(level, line)


def _is_zero(group: dict[str, Any]) -> bool:
    lr = group["lr"]
    # One on the GPU is not looked at: reading it would synchronise with the device, and torch's own zero is on the CPU.
    return not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0
