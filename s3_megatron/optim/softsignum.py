"""SoftSignum as a ``torch.optim.Optimizer``."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.kernels.call import SoftRule, Step
from s3_megatron.kernels.op import Implementation, check_implementation, step_
from s3_megatron.optim import registry
from s3_megatron.optim.columns import Lookups, columns_of, seed_on
from s3_megatron.optim.engine_optimizer import check_rounding
from s3_megatron.optim.pooled_median import median_and_deviation
from s3_megatron.optim.relaxed import RelaxedOptimizer
from s3_megatron.optim.settings import check_sizes, names_what_it_takes
from s3_megatron.optim.spec import Spec
from s3_megatron.optim.state import EXP_AVG


class SoftSignum(RelaxedOptimizer):
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
        implementation: the kernel, as S3's: "auto", "foreach", "cpu" (C++) or "triton".
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

    spec: ClassVar[Spec] = registry.SOFTSIGNUM
    single_pass: ClassVar[bool] = True
    counts_updates: ClassVar[bool] = True
    soft_map = "tanh"
    _kept: ClassVar[tuple[str, ...]] = ("implementation", *RelaxedOptimizer._kept)

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
        implementation: Implementation = "auto",
        state_dtype: torch.dtype = torch.float32,
        rounding_seed: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_implementation(implementation)
        check_rounding(state_dtype, rounding_seed)
        self.implementation = implementation
        self.state_dtype = state_dtype
        super().__init__(
            params,
            {
                "lr": lr,
                "beta": beta,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "rounding_seed": rounding_seed,
            },
            process_group=process_group,
            total_steps=total_steps,
            soft_start=soft_start,
            sign_iters=sign_iters,
            transition_iters=transition_iters,
            eps=eps,
            tmax=tmax,
        )

    def step_groups(self, tau: float) -> None:
        """Move every parameter that has a gradient, by the temperature ``tau``; infinity is a hard step."""
        given, self.next_step = self.next_step or Step(), None
        rules = []
        for group in self.param_groups:  # of all, before the first moves
            check_sizes(group["lr"], group["weight_decay"])
            rule = SoftRule(
                *(group["lr"], group["beta"], tau, group["weight_decay"]), *(group["nesterov"], group["maximize"])
            )
            rule.check()
            rules.append(rule)
        lookups = Lookups(self.state, given.models or {})
        for group, rule in zip(self.param_groups, rules, strict=True):
            # Steps must not share their noise, as groups do not.
            seed = None if group["rounding_seed"] is None else group["rounding_seed"] + group["steps_taken"]
            for columns, memory in columns_of(self, group, given.models or {}, lookups):
                on_device = seed_on(columns["weight"][0].device, seed)
                step = Step(given.factor, None, self.update_statistics, on_device)
                step_(columns, rule, step, self.implementation, memory)

    def measure(self, *others: Self) -> tuple[float, float]:
        """Return median and median absolute deviation of m over the model; ``others`` have the rest on this rank."""
        return median_and_deviation([part for each in (self, *others) for part in each._measured()], self.ranks)

    def _measured(self) -> Iterator[Tensor]:
        """Give what this rank counts of every m."""
        params = [param for group in self.param_groups for param in group["params"]]
        # A weight that got no gradient yet has an m of 0, whether or not an engine has allocated it.
        ms = {param: self.state_of(param)[EXP_AVG] for param in params if param.requires_grad or self.state.get(param)}
        mixed = any(isinstance(m, DTensor) for m in ms.values())
        return (self._counted(param, m, self.ranks, mixed) for param, m in ms.items())

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
