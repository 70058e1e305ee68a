"""S3 as a ``torch.optim.Optimizer``."""

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels import foreach

# Megatron-LM and DeepSpeed find optimizer state in their checkpoints by Adam's two names, so S3 goes by them:
# m in the first, the root r = s^(1/p) in the second.
EXP_AVG = "exp_avg"
EXP_AVG_ROOT = "exp_avg_sq"

# Adam's checkpoints use the same two names with another meaning; this entry of every param group tells them apart.
STATE_MARK = "s3_state"
STATE_FORMAT = "exp_avg=m, exp_avg_sq=s^(1/p)"


class S3(torch.optim.Optimizer):
    """SoftSignSGD (arXiv 2507.06464, Algorithm 1): each weight moves by at most the learning rate.

    The state is two float32 tensors a parameter (float64 for float64 parameters), shaped like it and allocated at
    the first step: m, and the root r = s^(1/p). There is no step counter, no bias correction and no eps. A gradient
    coordinate that is not finite leaves its weight and state untouched. Parameters in bfloat16 or float16 are moved
    in float32 and rounded once.

    Args:
        params: parameters, or dicts defining param groups; any argument below can be set per group.
        lr: learning rate, >= 0; the largest distance a weight moves in one step.
        beta: decay of both averages, in [0, 1).
        p: exponent of the denominator, a finite number >= 1. 1, 2 and 3 are the fast ones.
        weight_decay: decoupled decay, >= 0: ``x <- x - lr * (update + weight_decay * x)``. Coming from AdamW, the
            paper sets it to ``lr_adamw * weight_decay_adamw / lr``.
        nesterov: look ahead one step in numerator and denominator, as Algorithm 1 does.
        betas: decays of m and s apart, for ablations; overrides ``beta``. Then |update| may exceed 1 (Theorem 2).
        maximize: maximize the objective instead of minimizing it.

    Raises:
        S3Error: (a ValueError) for a hyperparameter out of range, a complex or integer parameter, a sparse gradient,
            or a loaded state that is not S3's.
    """

    # [sum, max] of |update| over the last step, float64, if somebody put a tensor of two zeros here.
    update_statistics: Tensor | None = None

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
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": (beta, beta) if betas is None else tuple(betas),
            "p": p,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            STATE_MARK: STATE_FORMAT,
        }
        _check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyperparameters; ``beta`` sets both ``betas``."""
        group = dict(param_group)
        if "beta" in group:
            beta = group.pop("beta")
            group["betas"] = (beta, beta)
        _check_hyperparameters({**self.defaults, **group})
        super().add_param_group(group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                self.param_groups.pop()
                raise S3Error(
                    f"S3 cannot train a parameter of dtype {param.dtype}: it takes real floating-point parameters; "
                    "view a complex parameter as real (torch.view_as_real) or leave it out"
                )

    def allocate_state(self) -> None:
        """Allocate zero state for every parameter that has none; ``step`` does so where there is a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        for name in (EXP_AVG, EXP_AVG_ROOT):
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=_state_dtype(param), requires_grad=False)
        return state

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
        if self.update_statistics is not None:
            self.update_statistics.zero_()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        buckets: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], ...]] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise S3Error("S3 does not take sparse gradients: build the embedding with sparse=False")
            state = self._state_of(param)
            key = (param.device, state[EXP_AVG].dtype)
            row = (param, param.grad, state[EXP_AVG], state[EXP_AVG_ROOT])
            for column, tensor in zip(buckets.setdefault(key, ([], [], [], [])), row, strict=True):
                column.append(tensor)
        beta1, beta2 = group["betas"]
        for params, grads, exp_avgs, exp_avg_roots in buckets.values():
            foreach.s3_step_(
                params,
                grads,
                exp_avgs,
                exp_avg_roots,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                p=group["p"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                statistics=self.update_statistics,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load S3's own state; keeps the state's dtype, which torch would cast to the parameter's.

        Raises:
            S3Error: the state was not written by S3 (an Adam checkpoint has the same names and another meaning).
        """
        if not is_s3_state(state_dict["param_groups"]):
            raise S3Error(
                "this optimizer state was not written by S3 (its param groups lack the mark "
                f"{STATE_MARK!r}); an Adam state is turned into S3's by s3_megatron.optim.from_adam_state, or start "
                "with fresh optimizer state"
            )
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, params, strict=True):
            for name in (EXP_AVG, EXP_AVG_ROOT):
                source = state_dict["state"].get(index, {}).get(name)
                if source is not None and self.state[param][name].dtype != _state_dtype(param):
                    self.state[param][name] = source.to(device=param.device, dtype=_state_dtype(param))


def is_s3_state(param_groups: Iterable[dict[str, Any]]) -> bool:
    """Tell whether saved param groups carry S3's mark."""
    return all(group.get(STATE_MARK) == STATE_FORMAT for group in param_groups)


def from_adam_state(state_dict: dict[str, Any], optimizer: S3) -> dict[str, Any]:
    """Turn the state dict of an Adam(W) over the same parameters into one that ``optimizer`` loads.

    m is taken as it is and r = sqrt(v); the learning rate, decay and betas become those of ``optimizer``.
    Nothing is modified in place.
    """
    state = {
        index: {EXP_AVG: entry[EXP_AVG], EXP_AVG_ROOT: entry[EXP_AVG_ROOT].sqrt()}
        for index, entry in state_dict["state"].items()
    }
    groups = [
        {**{k: v for k, v in ours.items() if k != "params"}, "params": saved["params"]}
        for ours, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    return {"state": state, "param_groups": groups}


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _check_hyperparameters(group: dict[str, Any]) -> None:
    """Raise S3Error for a value out of range."""
    lr, p, weight_decay, betas = group["lr"], group["p"], group["weight_decay"], group["betas"]
    # A learning rate on the GPU is not looked at: reading it would synchronise with the device.
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    if not on_device and not (0 <= lr < math.inf):
        raise S3Error(f"lr is {lr}: it must be a finite number >= 0")
    if len(betas) != 2:
        raise S3Error(f"betas is {betas}: it must be a pair, the decays of m and of s")
    if not all(0 <= beta < 1 for beta in betas):
        shown = betas[0] if len(set(betas)) == 1 else betas
        raise S3Error(f"beta is {shown}: every beta must lie in [0, 1); 0.95 is the paper's")
    if not 1 <= p < math.inf:
        raise S3Error(f"p is {p}: it must be a finite number >= 1; 3 is the paper's")
    if not 0 <= weight_decay < math.inf:
        raise S3Error(f"weight_decay is {weight_decay}: it must be a finite number >= 0")
