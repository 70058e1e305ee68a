"""S3 as a ``torch.optim.Optimizer``."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels import rows
from s3_megatron.kernels.examine import Columns
from s3_megatron.kernels.metadata import Memory
from s3_megatron.kernels.op import IMPLEMENTATIONS, Implementation, step_
from s3_megatron.optim.lookup import Lookup
from s3_megatron.optim.placement import localize
from s3_megatron.optim.settings import check_hyperparameters, check_step, names_what_it_takes, report_ignored
from s3_megatron.optim.state import (
    EXP_AVG,
    EXP_AVG_ROOT,
    NAMES,
    STATE_FORMAT,
    STATE_MARK,
    check_entry,
    check_groups,
)

type Lookups = tuple[Lookup, Lookup]  # of states, and of model parameters


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

    # Over the last step, where ``watch.statistics.zeros`` were put here, on the weights' device.
    update_statistics: Tensor | None = None

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
        check_hyperparameters(defaults)
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
        check_hyperparameters({**self.defaults, **group})
        report_ignored(group)
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
        self._keep_on_device(added, {})

    def allocate_state(self) -> None:
        """Allocate zero state for every parameter that has none; ``step`` does so where there is a gradient.

        State that an engine put there in another dtype is converted to this optimizer's.
        """
        for group in self.param_groups:
            for param in group["params"]:
                state = self._state_of(param)
                for name in NAMES:
                    state[name] = state[name].to(self._state_dtype(param))

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        check_entry(state, param.shape)
        for name in NAMES:
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
        # ZeroRedundancyOptimizer writes state and groups into the optimizer that it wraps, past every method.
        check_groups(self.param_groups)
        if self.update_statistics is not None:
            self.update_statistics.zero_()
        # torch's compiler cannot follow them, and needs them not.
        lookups = None if torch.compiler.is_compiling() else (Lookup(self.state), Lookup(self.model_params))
        for group in self.param_groups:
            check_step(group)  # of all, before the first moves
        for group in self.param_groups:
            self._step_group(group, lookups)
        return loss

    def _step_group(self, group: dict[str, Any], lookups: Lookups | None) -> None:
        self._keep_on_device(group, {})
        seed, lr = group["rounding_seed"], group["lr"]
        if lookups is None and not isinstance(lr, Tensor):
            # The compiled op takes a tensor. Not as_tensor, for which torch's compiler takes a float as it is, and
            # compiles again for the next.
            lr = torch.full((), lr, dtype=torch.float64, device="cpu")
        for columns, memory in self._rows(group, lookups):
            params, grads, exp_avgs, exp_avg_roots, *low = columns
            (torch.ops.s3.step_ if lookups is None else step_)(
                params,
                grads,
                exp_avgs,
                exp_avg_roots,
                low[0] if low else [],
                self.update_statistics,
                lr,
                self.grad_scale,
                self.found_inf,
                _on(params[0].device, seed),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                p=group["p"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                implementation=self.implementation,
                **({} if memory is None else {"memory": memory}),
            )
        if isinstance(seed, Tensor):
            seed += 1
        elif seed is not None:
            group["rounding_seed"] = seed + 1

    def _rows(self, group: dict[str, Any], lookups: Lookups | None) -> list[tuple[Columns, Memory | None]]:
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
        entries, *states = self._states(params, lookups)
        columns: Columns = [params, grads, *states]
        models: list[Any] = []
        if self.model_params:
            models = lookups[1].of(params) if lookups else [self.model_params.get(param) for param in params]
        if lookups is not None and type(None) not in set(map(type, models)):
            whole: Columns = [*columns, models] if models else columns
            memory = rows.read(whole)
            if memory is not None:
                return [(whole, memory)]
        if any(issubclass(kind, DTensor) for kind in set(map(type, params))):
            local = [localize(*row, NAMES) for row in zip(params, grads, entries, strict=True)]
            columns = [list(column) for column in zip(*local, strict=True)]
        return [(part, None) for part in _apart(columns, models or [None] * len(params))]

    def _states(self, params: list[Tensor], lookups: Lookups | None) -> tuple[list[Any], list[Tensor], list[Tensor]]:
        """Return the entries of parameters in the state, which get one if they have none, and m and r of each."""
        entries = [] if lookups is None else lookups[0].of(params)
        try:
            if sum(map(len, entries)) == len(NAMES) * len(params):
                return entries, [entry[EXP_AVG] for entry in entries], [entry[EXP_AVG_ROOT] for entry in entries]
        except (TypeError, KeyError):  # none yet, or not S3's
            pass
        entries = [self._state_of(param) for param in params]
        return entries, [entry[EXP_AVG] for entry in entries], [entry[EXP_AVG_ROOT] for entry in entries]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load S3's own state, in this optimizer's ``state_dtype``; torch would cast it to the parameter's dtype.

        Hooks come first, and what they return is what is looked at.

        Raises:
            S3Error: the state was not written by S3 (an Adam checkpoint has the same names and another meaning).
        """
        saved: dict[str, Any] = {}

        def keep(_: torch.optim.Optimizer, hooked: dict[str, Any]) -> None:
            check_groups(hooked["param_groups"])
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
        """Take state and param groups, which torch, pickle and copies bring here, once they are known to be S3's.

        Raises:
            S3Error: they are another optimizer's, or a value is out of range; nothing has changed.
        """
        groups, entries = state["param_groups"], state["state"]
        check_groups(groups)
        here = self.__dict__.get("param_groups", groups)
        for ours, group in zip(here, groups, strict=True):
            # What an older S3 did not have yet.
            for name, default in (self.__dict__ | state)["defaults"].items():
                group.setdefault(name, ours.get(name, default))
            group.pop("differentiable", None)  # torch adds it to the defaults of what was loaded
            check_hyperparameters(group)
            report_ignored(group)
        for param, entry in entries.items():
            if isinstance(param, Tensor):
                check_entry(entry, param.shape, marked=True)
                if isinstance(entry.get("step"), Tensor):
                    del entry["step"]  # of an Adam whose state was converted, or of Megatron's own making
        if "_uncast" in self.__dict__:
            self._restore_dtypes(groups, entries)
        super().__setstate__(state)
        for ours, group in zip(here, groups, strict=True):
            self._keep_on_device(group, ours)

    def _restore_dtypes(self, groups: list[dict[str, Any]], entries: dict[Any, dict[str, Any]]) -> None:
        """Replace states that torch has cast to their parameter's dtype by what was saved, in this optimizer's."""
        indices = chain.from_iterable(group["params"] for group in self._uncast["param_groups"])
        params = chain.from_iterable(group["params"] for group in groups)
        for index, param in zip(indices, params, strict=True):
            source, dtype = self._uncast["state"].get(index, {}), self._state_dtype(param)
            for name in NAMES:
                if name in source and entries[param][name].dtype != dtype:
                    entries[param][name] = source[name].to(device=param.device, dtype=dtype)

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


def _apart(columns: Columns, models: list[Tensor | None]) -> list[Columns]:
    """Sort rows apart by device, and by whether they have a model parameter."""
    parts: dict[tuple[torch.device, bool], list[list[Tensor]]] = {}
    for *row, model in zip(*columns, models, strict=True):
        row += [] if model is None else [model]
        part = parts.setdefault((row[0].device, model is None), [[] for _ in row])
        for column, x in zip(part, row, strict=True):
            column.append(x)
    return [list(part) for part in parts.values()]


def _on(device: torch.device, seed: int | Tensor | None) -> Tensor | None:
    """The seed as a tensor there. Not as_tensor for a number: it copies from the host, which then waits for the GPU."""
    if seed is None or isinstance(seed, Tensor):
        return None if seed is None else seed.to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)
