"""S3 as a ``torch.optim.Optimizer``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels import rows
from s3_megatron.kernels.call import ROLES, Columns, Kind, Rule, Step
from s3_megatron.kernels.metadata import Memory
from s3_megatron.kernels.op import IMPLEMENTATIONS, Implementation, step_
from s3_megatron.optim import registry
from s3_megatron.optim.engine_optimizer import EngineOptimizer, check_rounding
from s3_megatron.optim.lookup import Lookup
from s3_megatron.optim.placement import localize
from s3_megatron.optim.settings import check_step, names_what_it_takes, report_ignored
from s3_megatron.optim.spec import NAMES, Spec
from s3_megatron.optim.state import EXP_AVG, EXP_AVG_ROOT, check_groups

type Lookups = tuple[Lookup, Lookup]  # of states, and of the model's copies


class S3(EngineOptimizer):
    """SoftSignSGD (arXiv 2507.06464, Algorithm 1): each weight moves by at most the learning rate.

    The state is two tensors a parameter, shaped like it and allocated at the first step: m, and the root r = s^(1/p).
    There is no step counter, no bias correction and no eps. A gradient coordinate that is not finite leaves its
    weight and state untouched. Parameters in bfloat16 or float16 are moved in float32 and rounded once.

    Args:
        params: parameters, or dicts defining param groups; lr to maximize can be set per group.
        lr: learning rate, >= 0; the largest distance a weight moves in one step.
        beta: decay of both averages, in [0, 1).
        p: exponent of the denominator, a finite number >= 1. 1, 2 and 3 are the fast ones.
        weight_decay: decoupled decay, >= 0: ``x <- x - lr * (update + weight_decay * x)``. Coming from AdamW, the
            paper sets it to ``lr_adamw * weight_decay_adamw / lr``.
        nesterov: look ahead one step in numerator and denominator, as Algorithm 1 does.
        betas: decays of m and s apart, for ablations; overrides ``beta``. Then |update| may exceed 1 (Theorem 2).
        maximize: maximize the objective instead of minimizing it.
        implementation: the kernel: "auto" takes the best that works where the tensors are, and logs which; or
            "foreach", "cpu" (C++), "triton".
        state_dtype: dtype of m and r: torch.float32, or torch.bfloat16 for half the memory. Float64 parameters
            always have float64 states.
        rounding_seed: if given, bfloat16 states are rounded stochastically with noise of this seed, which counts up
            in the param groups and so in checkpoints; if None, to nearest even.
        capturable: keep what changes between steps (lr, the seed) in tensors on the parameters' device, so that a
            step can be captured in a CUDA graph.

    Raises:
        S3Error: (a ValueError) for a hyperparameter out of range, a complex or integer parameter, a sparse gradient,
            an implementation that cannot run, or a loaded state that is not S3's.
    """

    spec: ClassVar[Spec] = registry.S3
    single_pass: ClassVar[bool] = True
    counts_updates: ClassVar[bool] = True
    _kept: ClassVar[tuple[str, ...]] = ("implementation", "state_dtype", "capturable")

    @names_what_it_takes
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        beta: float = 0.95,
        p: float = 3.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        betas: tuple[float, float] | None = None,
        maximize: bool = False,
        implementation: Implementation = "auto",
        state_dtype: torch.dtype = torch.float32,
        rounding_seed: int | None = None,
        capturable: bool = False,
    ) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise S3Error(f"implementation is {implementation!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
        check_rounding(state_dtype, rounding_seed)
        self.implementation = implementation
        self.state_dtype = state_dtype
        self.capturable = capturable
        defaults = {
            "lr": lr,
            "betas": (beta, beta) if betas is None else tuple(betas),
            "p": p,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyperparameters; ``beta`` sets both ``betas``."""
        group = dict(param_group)
        if "beta" in group:
            beta = group.pop("beta")
            group["betas"] = (beta, beta)
        super().add_param_group(group)
        report_ignored(group)
        self._keep_on_device(self.param_groups[-1], {})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # ZeroRedundancyOptimizer writes state and groups into the optimizer that it wraps, past every method.
        check_groups(self.param_groups, self.spec)
        if self.update_statistics is not None:
            self.update_statistics.zero_()
        given, self.next_step = self.next_step or Step(), None
        # torch's compiler cannot follow them, and needs them not.
        lookups = None if torch.compiler.is_compiling() else (Lookup(self.state), Lookup(given.models or {}))
        for group in self.param_groups:
            check_step(group)  # of all, before the first moves
        for group in self.param_groups:
            self._step_group(group, given, lookups)
        return loss

    def _step_group(self, group: dict[str, Any], given: Step, lookups: Lookups | None) -> None:
        self._keep_on_device(group, {})
        seed, (beta1, beta2) = group["rounding_seed"], group["betas"]
        rule = Rule(
            *(group["lr"], beta1, beta2, group["p"]),
            *(group["weight_decay"], group["nesterov"], group["maximize"]),
        )
        for columns, memory in self._rows(group, given.models or {}, lookups):
            on_device = _on(columns["weight"][0].device, seed)
            step = Step(given.factor, given.found_inf, self.update_statistics, on_device)
            step_(columns, rule, step, self.implementation, memory)
        if isinstance(seed, Tensor):
            seed += 1
        elif seed is not None:
            group["rounding_seed"] = seed + 1

    def _rows(
        self, group: dict[str, Any], copies: Mapping[Tensor, Tensor], lookups: Lookups | None
    ) -> list[tuple[Columns, Memory | None]]:
        """List a group's parameters, gradients, m, r and model parameters, one device and kind of row at a time.

        Beside each list is what ``rows.read`` found, if it is as a kernel wants it.
        """
        # Shards come by the thousand, and a step of a small one takes a microsecond: loops are few and short here.
        params, grads = group["params"], [param.grad for param in group["params"]]
        if type(None) in set(map(type, grads)):
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if not params:
            return []
        entries, exp_avgs, roots = self._states(params, lookups)
        models: list[Any] = []
        if copies:
            models = lookups[1].of(params) if lookups else [copies.get(param) for param in params]
        if lookups is not None and type(None) not in set(map(type, models)):
            lists: dict[Kind, Sequence[Tensor]] = {"weight": params, "gradient": grads, "m": exp_avgs, "r": roots}
            columns = Columns({**lists, "model weight": models} if models else lists, self.format)
            memory = rows.read(columns)
            if memory is not None:
                return [(columns, memory)]
        local: list[tuple[Tensor, ...]] = list(zip(params, grads, exp_avgs, roots, strict=True))
        if any(issubclass(kind, DTensor) for kind in set(map(type, params))):
            local = [localize(*row, NAMES) for row in zip(params, grads, entries, strict=True)]
        return [(Columns(part, self.format), None) for part in _apart(local, models or [None] * len(params))]

    def _states(self, params: list[Tensor], lookups: Lookups | None) -> tuple[list[Any], list[Tensor], list[Tensor]]:
        """Return the entries of parameters in the state, which get one if they have none, and m and r of each."""
        entries = [] if lookups is None else lookups[0].of(params)
        try:
            if sum(map(len, entries)) == len(NAMES) * len(params):
                return entries, [entry[EXP_AVG] for entry in entries], [entry[EXP_AVG_ROOT] for entry in entries]
        except (TypeError, KeyError):  # none yet, or not S3's
            pass
        entries = [self.state_of(param) for param in params]
        return entries, [entry[EXP_AVG] for entry in entries], [entry[EXP_AVG_ROOT] for entry in entries]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take state and param groups as any engine's optimizer does, and keep what graphs read."""
        groups = state["param_groups"]
        here = self.__dict__.get("param_groups", groups)
        super().__setstate__(state)
        for ours, group in zip(here, groups, strict=True):
            report_ignored(group)
            self._keep_on_device(group, ours)

    def _keep_on_device(self, group: dict[str, Any], before: dict[str, Any]) -> None:
        """Where a step can be captured, hold lr and seed in tensors: those of ``before``, which graphs read."""
        if not self.capturable or not group["params"]:
            return
        for name, dtype in (("lr", torch.float32), ("rounding_seed", torch.int64)):
            value, held = group[name], before.get(name)
            if value is None or (value is held and isinstance(value, Tensor)):
                continue
            value = torch.as_tensor(value, dtype=dtype).to(group["params"][0].device)
            group[name] = held.copy_(value) if isinstance(held, Tensor) else value


def _apart(rows: list[tuple[Tensor, ...]], models: list[Tensor | None]) -> list[dict[Kind, Sequence[Tensor]]]:
    """Sort rows apart by device, and by whether they have a model parameter."""
    parts: dict[tuple[torch.device, bool], list[tuple[Tensor, ...]]] = {}
    for row, model in zip(rows, models, strict=True):
        parts.setdefault((row[0].device, model is None), []).append(row if model is None else (*row, model))
    return [dict(zip(ROLES, map(list, zip(*part, strict=True)), strict=False)) for part in parts.values()]


def _on(device: torch.device, seed: int | Tensor | None) -> Tensor | None:
    """The seed as a tensor there. Not as_tensor for a number: it copies from the host, which then waits for the GPU."""
    if seed is None or isinstance(seed, Tensor):
        return None if seed is None else seed.to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)
