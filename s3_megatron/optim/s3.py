"""S3 as a ``torch.optim.Optimizer``."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from s3_megatron.kernels.call import Rule, Step
from s3_megatron.kernels.op import Implementation, check_implementation, step_
from s3_megatron.optim import registry
from s3_megatron.optim.columns import Lookups, columns_of, seed_on
from s3_megatron.optim.engine_optimizer import EngineOptimizer, check_rounding
from s3_megatron.optim.settings import check_step, names_what_it_takes, report_ignored
from s3_megatron.optim.spec import Spec
from s3_megatron.optim.state import check_groups


def _compiled_from_2_12[**P, R](method: Callable[P, R]) -> Callable[P, R]:
    """Have code that an older torch compiles call ``method`` as it is: that one's compiler ends in errors of its own.

    Up to 2.11 it raises where an optimizer sets an attribute, up to 2.9 in other places too.
    """
    return method if torch.__version__ >= "2.12" else torch.compiler.disable(method)


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
        check_implementation(implementation)
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
        if not self.capturable:
            self.refuse_capture("make the optimizer with capturable=True")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    # Not step itself: torch hooks it, and up to 2.10 then calls what was disabled there without its object.
    @_compiled_from_2_12
    def _step(self) -> None:
        # ZeroRedundancyOptimizer writes state and groups into the optimizer that it wraps, past every method.
        check_groups(self.param_groups, self.spec)
        if self.update_statistics is not None:
            self.update_statistics.zero_()
        given, self.next_step = self.next_step or Step(), None
        # torch's compiler cannot follow them, and needs them not.
        lookups = None if torch.compiler.is_compiling() else Lookups(self.state, given.models or {})
        for group in self.param_groups:
            check_step(group)  # of all, before the first moves
        for group in self.param_groups:
            self._step_group(group, given, lookups)

    def _step_group(self, group: dict[str, Any], given: Step, lookups: Lookups | None) -> None:
        self._keep_on_device(group, {})
        seed, (beta1, beta2) = group["rounding_seed"], group["betas"]
        rule = Rule(
            *(group["lr"], beta1, beta2, group["p"]),
            *(group["weight_decay"], group["nesterov"], group["maximize"]),
        )
        for columns, memory in columns_of(self, group, given.models or {}, lookups):
            on_device = seed_on(columns["weight"][0].device, seed)
            step = Step(given.factor, given.found_inf, self.update_statistics, on_device)
            step_(columns, rule, step, self.implementation, memory)
        if isinstance(seed, Tensor):
            seed += 1
        elif seed is not None:
            group["rounding_seed"] = seed + 1

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
