"""SoftSignum as a ``torch.optim.Optimizer``."""

import logging
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels.softsignum import softsignum_step_
from s3_megatron.optim.marked import MarkedOptimizer
from s3_megatron.optim.placement import localize
from s3_megatron.optim.pooled_median import median_and_deviation
from s3_megatron.optim.settings import names_what_it_takes
from s3_megatron.optim.state import EXP_AVG
from s3_megatron.optim.temperature import Schedule, phases

logger = logging.getLogger(__name__)

# The six numbers of the schedule, by their names in the param groups. Each in a place of its own, and of one type from
# the start: torch's full_state_dict takes a tuple apart, and cannot load it where there is a None.
_SCHEDULE = {
    "mu": "soft_mu",
    "sigma": "soft_sigma",
    "eps": "eps",
    "first": "soft_first",
    "length": "soft_length",
    "map": "soft_map",
}
# What all param groups share: how the run is to be relaxed, and where it is.
_PLAN = ("sign_iters", "transition_iters", "eps", "tmax")
_OF_THE_RUN = {*_PLAN, "step", *_SCHEDULE.values()}


class SoftSignum(MarkedOptimizer):
    """SoftSignum (arXiv 2605.31371): a momentum's sign, which becomes a soft one near the end of the run.

    m is an average of the gradient. In the hard phase a weight moves by ``lr * sign(m)``, in the soft phase by
    ``lr * tanh(tau * m)``, with a tau that falls from step to step (``optim/temperature.py``): never by more than lr.
    The state is one tensor a parameter, m, shaped like it and allocated at the first step. A gradient coordinate that
    is not finite leaves its weight and m untouched. Parameters in bfloat16 or float16 are moved in float32 and rounded
    once.

    Where the soft phase begins, median and median absolute deviation of m are taken over the whole model: every
    parameter that requires a gradient or has a state. All ranks that hold a part of it must take that step; it
    communicates, and waits for the device. A step at rate 0 in every group does not count: torch's checkpoint functions
    take one, on some ranks, to allocate state.

    Args:
        params: parameters, or dicts defining param groups; lr, beta, weight_decay, nesterov, maximize and
            rounding_seed can be set per group.
        lr: learning rate, >= 0; the largest distance a weight moves in one step, the decay left out.
        beta: decay of m, in [0, 1).
        weight_decay: decoupled decay, >= 0: ``x <- x - lr * (update + weight_decay * x)``.
        nesterov: look ahead one step: ``beta * m + (1 - beta) * g`` in the place of m in the update.
        total_steps: steps of the run.
        soft_start: the share of the run that is hard, in [0, 1]; at 1 all of it is (Signum), and no length is needed.
        sign_iters: hard steps; in the place of ``soft_start``.
        transition_iters: soft steps, >= 1; with ``sign_iters``, in the place of ``total_steps``.
        eps: how far tanh stays below 1 at each quantile of the momentum, in (0, 1).
        tmax: the highest tau, >= 1. The first soft step has it: it is hard for all |m| above about 10 / tmax.
        maximize: maximize the objective instead of minimizing it.
        state_dtype: dtype of m: torch.float32, or torch.bfloat16 for half the memory. Float64 parameters always have
            a float64 m.
        rounding_seed: if given, a bfloat16 m is rounded stochastically with noise of this seed and the step's number;
            if None, to nearest even.
        process_group: the ranks that hold the model, each coordinate on one of them or all on every one; None: all
            ranks, where torch.distributed runs. Not kept by copies.

    Raises:
        S3Error: (a ValueError) for a hyperparameter out of range, a run without a known length, a complex or integer
            parameter, a sparse gradient, or a loaded state that is not SoftSignum's.
    """

    title = "SoftSignum"
    state_names = (EXP_AVG,)
    mark = "softsignum_state"
    state_format = f"{EXP_AVG}=m"

    # For engines whose tensors do not show it: what this rank counts of a parameter's m, as that lies here, in the
    # median: ``m`` itself, a part of it without padding, or an empty one where another rank counts it.
    counted: Callable[[Tensor, Tensor], Tensor] | None = None
    process_group: dist.ProcessGroup | None = None

    @names_what_it_takes
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        total_steps: int | None = None,
        soft_start: float = 0.9,
        sign_iters: int | None = None,
        transition_iters: int | None = None,
        eps: float = 1e-4,
        tmax: float = 1e9,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
        rounding_seed: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise S3Error(f"state_dtype is {state_dtype}: it must be torch.float32 or torch.bfloat16")
        if rounding_seed is not None and state_dtype != torch.bfloat16:
            raise S3Error("rounding_seed is for state_dtype=torch.bfloat16: a float32 state is not rounded")
        self.state_dtype = state_dtype
        self.process_group = process_group
        self._asked = {
            "total_steps": total_steps,
            "soft_start": soft_start,
            "sign_iters": sign_iters,
            "transition_iters": transition_iters,
            "eps": eps,
            "tmax": tmax,
        }
        hard, soft = phases(total_steps, soft_start, sign_iters, transition_iters)
        if soft and process_group is not None and dist.get_rank(process_group) < 0:
            raise S3Error("this rank is not in process_group: give the group of all ranks that hold the model")
        defaults = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "rounding_seed": rounding_seed,
            "sign_iters": int(hard),  # numpy's could not be loaded with weights_only
            "transition_iters": int(soft),
            "eps": eps,
            "tmax": tmax,
            "step": 0,
            "soft_mu": 0.0,
            "soft_sigma": 0.0,
            "soft_first": -1,
            "soft_length": 0,
            "soft_map": "tanh",
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_asked": self._asked}

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise S3Error for a hyperparameter out of range."""
        super().check_group(group)
        if not 0 <= group["beta"] < 1:
            raise S3Error(f"beta is {group['beta']}: it must lie in [0, 1); 0.9 is usual")
        if not 0 < group["eps"] < 1:
            raise S3Error(f"eps is {group['eps']}: it must lie in (0, 1); 1e-4 is the paper's")
        if not group["tmax"] >= 1:
            raise S3Error(f"tmax is {group['tmax']}: it must be a number >= 1; 1e9 leaves the first soft step hard")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyperparameters; the phases are the whole run's."""
        # ZeroRedundancyOptimizer gives every group what it gives the optimizer itself.
        shared = param_group.keys() & (_OF_THE_RUN | self._asked.keys())
        own = sorted(name for name in shared if param_group[name] != self._asked.get(name))
        if own:
            raise S3Error(f"a param group has {', '.join(own)}: that is the whole run's; give it to SoftSignum")
        super().add_param_group({name: value for name, value in param_group.items() if name not in shared})
        added = self.param_groups[-1]
        added.update({name: self.param_groups[0][name] for name in _OF_THE_RUN})
        for param in added["params"]:
            self._check_mesh(param)

    def _check_mesh(self, param: Tensor) -> None:
        if self.process_group is not None or not isinstance(param, DTensor):
            return
        ranks, mesh = dist.get_world_size(), param.device_mesh
        if mesh.size() != ranks and self.param_groups[0]["transition_iters"]:
            self.param_groups.pop()
            raise S3Error(
                f"a weight of shape {list(param.shape)} is on {mesh.size()} of {ranks} ranks: give process_group, the "
                "ranks that hold the model, over which the temperature is taken"
            )

    @property
    def schedule(self) -> Schedule | None:
        """What every temperature follows from; None before the soft phase."""
        run = self.param_groups[0]
        return None if run["soft_first"] < 0 else Schedule(**{name: run[key] for name, key in _SCHEDULE.items()})

    @property
    def tau(self) -> float:
        """The temperature of the step to come; infinity is a hard one."""
        run, schedule = self.param_groups[0], self.schedule
        if schedule is not None:
            return schedule.tau(run["step"], run["tmax"])
        # The quantile at 0 is 0, so the first soft step needs no median: it is known when the next one begins.
        return float(run["tmax"]) if self._is_soft() else math.inf

    def _is_soft(self) -> bool:
        run = self.param_groups[0]
        return bool(run["transition_iters"]) and run["step"] >= run["sign_iters"]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    # Compiled code calls it as it is: another number in every step, and at one of them talk with other ranks.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # ZeroRedundancyOptimizer writes state and groups into the optimizer that it wraps, past every method.
        self.check_marks(self.param_groups)
        tau = self.tau
        for index, group in enumerate(self.param_groups):
            self._step_group(group, tau, index)
        if not all(map(_is_zero, self.param_groups)):
            self._count_step()
        return loss

    def _step_group(self, group: dict[str, Any], tau: float, index: int) -> None:
        seed = group["rounding_seed"]
        if seed is not None:
            # Neither steps nor groups share their noise.
            seed += (index << 40) + group["step"]
        parts: dict[torch.device, list[list[Tensor]]] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            local = localize(param, param.grad, self.state_of(param), self.state_names)
            for column, x in zip(parts.setdefault(param.device, [[], [], []]), local, strict=True):
                column.append(x)
        for params, grads, exp_avgs in parts.values():
            softsignum_step_(
                params,
                grads,
                exp_avgs,
                lr=group["lr"],
                beta=group["beta"],
                tau=tau,
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                rounding_seed=seed,
            )

    def _count_step(self) -> None:
        run = self.param_groups[0]
        if self._is_soft() and self.schedule is None:
            first, length = run["step"], max(run["sign_iters"] + run["transition_iters"] - run["step"], 1)
            schedule = Schedule(*self._measure(), run["eps"], first, length, "tanh")
            if os.environ.get("RANK", "0") == "0":
                last = schedule.tau(first + length, run["tmax"])
                logger.info("SoftSignum is soft for %d steps, down to a tau of %.4g: %s", length, last, schedule)
            for group in self.param_groups:
                group.update({key: getattr(schedule, name) for name, key in _SCHEDULE.items()})
        steps = run["step"] + 1
        for group in self.param_groups:
            group["step"] = steps

    def _measure(self) -> tuple[float, float]:
        """Return median and median absolute deviation of m over the model."""
        params = [param for group in self.param_groups for param in group["params"]]
        # A weight that got no gradient yet has an m of 0, whether or not an engine has allocated it.
        ms = {param: self.state_of(param)[EXP_AVG] for param in params if param.requires_grad or self.state.get(param)}
        group = self.process_group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        mixed = any(isinstance(m, DTensor) for m in ms.values())
        mu, sigma = median_and_deviation([self._counted(param, m, group, mixed) for param, m in ms.items()], group)
        if not (math.isfinite(mu) and math.isfinite(sigma)):
            raise S3Error(
                f"the median of the momentum is {mu}, of its deviation {sigma}: the soft phase cannot begin; resume "
                "from a checkpoint whose state is finite"
            )
        return mu, sigma

    def _counted(self, param: Tensor, m: Tensor, group: dist.ProcessGroup | None, mixed: bool) -> Tensor:
        """Return the part of m that this rank counts: each coordinate is to be counted once."""
        local = m.to_local() if isinstance(m, DTensor) else m
        if self.counted is not None:
            return self.counted(param, local)
        if isinstance(m, DTensor):
            place = m.device_mesh.get_coordinate()
            is_copy = place is None or any(
                index and placement.is_replicate() for index, placement in zip(place, m.placements, strict=True)
            )
        else:
            # Beside DTensors a plain weight is on every rank. Where all are plain it may be a shard as well; and where
            # every rank counts the whole model, the median is that of one.
            is_copy = mixed and dist.get_rank(group) > 0
        return local.reshape(-1)[:0] if is_copy else local

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take state and param groups; before the soft phase this optimizer's own phases, eps and tmax count."""
        ours = self.__dict__.get("param_groups", state["param_groups"])[0]
        plan = {name: ours[name] for name in _PLAN if name in ours}
        super().__setstate__(state)
        run, schedule = self.param_groups[0], self.schedule
        if schedule is None:
            for group in self.param_groups:
                group.update(plan)
            return
        ignored = ", ".join(f"{name}={value}" for name, value in plan.items() if run[name] != value)
        if ignored and os.environ.get("RANK", "0") == "0":
            logger.warning(
                f"the state was saved in its soft phase, which goes on as it began, {schedule.length} steps from step "
                f"{schedule.first}: {ignored} of this run does not count"
            )


def _is_zero(group: dict[str, Any]) -> bool:
    lr = group["lr"]
    # One on the GPU is not looked at: reading it would synchronise with the device, and torch's own zero is on the CPU.
    return not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0
