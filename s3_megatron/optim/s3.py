"""S3 as a ``torch.optim.Optimizer``."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels.op import IMPLEMENTATIONS, Implementation, step_

logger = logging.getLogger(__name__)

# Megatron-LM and DeepSpeed find optimizer state in their checkpoints by Adam's two names, so S3 goes by them:
# m in the first, the root r = s^(1/p) in the second.
EXP_AVG = "exp_avg"
EXP_AVG_ROOT = "exp_avg_sq"

# Adam's checkpoints use the same two names with another meaning; this entry of every param group tells them apart.
STATE_MARK = "s3_state"
STATE_FORMAT = "exp_avg=m, exp_avg_sq=s^(1/p)"


class S3(torch.optim.Optimizer):
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

    # What an engine hands over for a single pass (see kernels.op): the model's low-precision copy of a weight to write;
    # and one float32 each on the device, the gradients' factor and the flag that makes a step do nothing.
    model_params: Mapping[Tensor, Tensor] = {}
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    # Over the last step, if somebody put five float64 zeros here: see ``statistics`` in kernels.op.
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
        implementation: Implementation = "auto",
        state_dtype: torch.dtype = torch.float32,
        rounding_seed: int | None = None,
        capturable: bool = False,
    ) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise S3Error(f"implementation is {implementation!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise S3Error(f"state_dtype is {state_dtype}: it must be torch.float32 or torch.bfloat16")
        if rounding_seed is not None and state_dtype != torch.bfloat16:
            raise S3Error("rounding_seed is for state_dtype=torch.bfloat16: float32 states are not rounded")
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
            STATE_MARK: STATE_FORMAT,
        }
        _check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what it does not know, and a copy would lack it.
        kept = ("implementation", "state_dtype", "capturable")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyperparameters; ``beta`` sets both ``betas``."""
        group = dict(param_group)
        if "beta" in group:
            beta = group.pop("beta")
            group["betas"] = (beta, beta)
        _check_hyperparameters({**self.defaults, **group})
        super().add_param_group(group)
        added = self.param_groups[-1]
        for param in added["params"]:
            if not param.is_floating_point():
                self.param_groups.pop()
                raise S3Error(
                    f"S3 cannot train a parameter of dtype {param.dtype}: it takes real floating-point parameters; "
                    "view a complex parameter as real (torch.view_as_real) or leave it out"
                )
        if added["rounding_seed"] is not None:
            # Groups must not share their noise.
            added["rounding_seed"] += (len(self.param_groups) - 1) << 40
        if self.capturable and added["params"]:
            device = added["params"][0].device
            for name, dtype in (("lr", torch.float32), ("rounding_seed", torch.int64)):
                if added[name] is not None:
                    added[name] = torch.as_tensor(added[name], dtype=dtype).to(device)

    def allocate_state(self) -> None:
        """Allocate zero state for every parameter that has none; ``step`` does so where there is a gradient.

        State that an engine put there in another dtype is converted to this optimizer's.
        """
        for group in self.param_groups:
            for param in group["params"]:
                state = self._state_of(param)
                for name in (EXP_AVG, EXP_AVG_ROOT):
                    state[name] = state[name].to(self._state_dtype(param))

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        for name in (EXP_AVG, EXP_AVG_ROOT):
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=self._state_dtype(param), requires_grad=False)
        return state

    def _state_dtype(self, param: Tensor) -> torch.dtype:
        return torch.float64 if param.dtype == torch.float64 else self.state_dtype

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
        _check_betas(group["betas"])
        seed = group["rounding_seed"]
        for params, grads, exp_avgs, exp_avg_roots, models in self._buckets(group):
            device = params[0].device
            (torch.ops.s3.step_ if torch.compiler.is_compiling() else step_)(
                params,
                grads,
                exp_avgs,
                exp_avg_roots,
                models,
                self.update_statistics,
                torch.as_tensor(group["lr"], dtype=None if isinstance(group["lr"], Tensor) else torch.float64),
                self.grad_scale,
                self.found_inf,
                None if seed is None else torch.as_tensor(seed, device=device),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                p=group["p"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                implementation=self.implementation,
            )
        if isinstance(seed, Tensor):
            seed += 1
        elif seed is not None:
            group["rounding_seed"] = seed + 1

    def _buckets(self, group: dict[str, Any]) -> Iterable[tuple[list[Tensor], ...]]:
        """Sort a group's tensors by device and dtypes: parameters, gradients, m, r and model parameters."""
        # Shards come by the thousand, and a step of a small one takes a microsecond: what can be is looked up once.
        buckets: dict[tuple[Any, ...], tuple[list[Tensor], ...]] = {}
        models = self.model_params
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise S3Error("S3 does not take sparse gradients: build the embedding with sparse=False")
            state = self._state_of(param)
            m, r = state[EXP_AVG], state[EXP_AVG_ROOT]
            model = models.get(param) if models else None
            if isinstance(param, DTensor):
                # FSDP2's: kernels move the shard that is here.
                param, grad, m, r = (x.to_local() if isinstance(x, DTensor) else x for x in (param, grad, m, r))
            key = (param.device, param.dtype, grad.dtype, m.dtype, None if model is None else model.dtype)
            columns = buckets.get(key) or buckets.setdefault(key, ([], [], [], [], []))
            columns[0].append(param)
            columns[1].append(grad)
            columns[2].append(m)
            columns[3].append(r)
            if model is not None:
                columns[4].append(model)
        return buckets.values()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load S3's own state, in this optimizer's ``state_dtype``; torch would cast it to the parameter's dtype.

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
                if source is not None and self.state[param][name].dtype != self._state_dtype(param):
                    self.state[param][name] = source.to(device=param.device, dtype=self._state_dtype(param))


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


def _check_betas(betas: tuple[float, float]) -> None:
    """Look at what a step is taken with: schedulers and callbacks write into the groups, and checkpoints bring theirs.

    Raises:
        S3Error: a decay is out of range.
    """
    beta1, beta2 = betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise S3Error(f"a param group's betas are {(beta1, beta2)}: both must lie in [0, 1); keep schedulers from them")
    if beta1 != beta2:
        _warn_of_two_betas(beta1, beta2)


_has_warned = False


@torch.compiler.assume_constant_result  # called while a step is compiled, and no part of what is compiled
def _warn_of_two_betas(beta1: float, beta2: float) -> None:
    """Say once a process, on rank 0, that the bound does not hold."""
    global _has_warned
    if not _has_warned and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"S3 steps with two betas, {beta1:g} and {beta2:g}: |update| <= 1 holds for one alone (Theorem 2), and a "
            "weight can move by more than lr. If this was not meant, keep what wrote them from S3's param groups: "
            "OneCycleLR and CyclicLR take cycle_momentum=False"
        )
    _has_warned = True
