"""The SoftSignum update over lists of tensors: the C++ loops on a CPU, ``torch._foreach_*`` on any device."""

import functools
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels import cpu
from s3_megatron.kernels.call import Columns, SoftRule
from s3_megatron.kernels.cpu import softsignum as one_pass
from s3_megatron.kernels.examine import examine
from s3_megatron.kernels.formats import PLAIN
from s3_megatron.kernels.rows import Unfit, sort

logger = logging.getLogger(__name__)

# Elements of the lists that a pass takes at once: more would only make its copies larger.
_AT_ONCE = 1 << 24


def softsignum_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta: float,
    tau: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool = False,
    rounding_seed: int | None = None,
) -> None:
    """Move every parameter by one SoftSignum step.

        m <- beta * m + (1 - beta) * g
        n  = m, or with nesterov beta * m + (1 - beta) * g
        x <- x - lr * (tanh(tau * n) + weight_decay * x)

    The arithmetic is float32 (float64 for float64 states); the tensors of a row have one shape and device. Plain dense
    tensors on the CPU, in float32, bfloat16 or float16, are moved in one pass over memory. All others go to foreach,
    as does all in what is compiled: nothing waits for a GPU, and it takes room for 2.3 times the gradients in float32,
    of 2^24 elements or one tensor at once.

    Args:
        params: weights, any floating dtype (modified in place); low-precision ones are moved in float32, rounded once.
        grads: gradients of the same shapes, any floating dtype; never modified. A coordinate whose gradient is not
            finite, or beyond a quarter of the arithmetic's range, keeps its weight and m.
        exp_avgs: m, float32, bfloat16 or float64 (modified in place).
        lr: learning rate; a tensor has one element, on the CPU or on the parameters' device.
        beta: decay of m, in [0, 1).
        tau: temperature, > 0. Infinity is the hard step, sign(n), and 0 where n is below the smallest normal number:
            after thousands of zero gradients m rests at a denormal, whose sign would move the weight for ever.
        weight_decay: decoupled.
        nesterov: look ahead by one step.
        maximize: ascend instead of descending; the decay still shrinks.
        rounding_seed: None, or a seed: bfloat16 states are then rounded stochastically, not to nearest even.

    Raises:
        S3Error: tau or beta is out of range, the lists do not belong together, or a tensor cannot be written. Nothing
            has been written.
    """
    if not tau > 0:
        raise S3Error(f"tau is {tau}: a temperature must be > 0; infinity is the hard step")
    # Schedulers and callbacks write into the groups.
    if not 0 <= beta < 1:
        raise S3Error(f"a param group's beta is {beta}: it must lie in [0, 1)")
    if not params:
        return
    columns = Columns({"weight": params, "gradient": grads, "m": exp_avgs})
    rule = SoftRule(lr, beta, tau, weight_decay, nesterov, maximize)
    if params[0].device.type != "cpu" or torch.compiler.is_compiling() or not _runs_in_one_pass():
        examine(columns)
        foreach_(columns, rule, rounding_seed)
        return
    try:
        one_pass.step_(columns, rule, rounding_seed)
        return
    except Unfit:
        pass
    # Several dtypes, or tensors that only foreach takes: every row is looked at before the first is moved.
    examine(columns)
    for part in sort(columns):
        try:
            one_pass.step_(part, rule, rounding_seed)
        except Unfit:
            foreach_(part, rule, rounding_seed)


@functools.cache
def _runs_in_one_pass() -> bool:
    """Whether the C++ loops run here; says so once."""
    reason = cpu.unavailable()
    if reason is None:
        logger.info("SoftSignum steps on cpu by kernel cpu (%s)", cpu.loop_name())
        return True
    logger.warning("SoftSignum steps on cpu by kernel foreach, in many passes over memory instead of one: %s", reason)
    return False


def foreach_(columns: Columns, rule: SoftRule, rounding_seed: int | None = None) -> None:
    """Move every parameter by ``torch._foreach_*``; rows that have been examined, as in ``softsignum_step_``."""
    lr, beta, tau, weight_decay, nesterov, maximize = rule
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    first = 0
    for weights, gradients, states in _batches(columns["weight"], columns["gradient"], columns["m"]):
        stored = PLAIN[states[0].dtype]
        dtype = stored.computed
        m = [stored.read(state) for state in states]  # a float32 state itself
        g = [grad.to(dtype) for grad in gradients]
        if maximize:
            g = list(torch._foreach_neg(g))
        limit = torch.finfo(dtype).max / 4
        # NaN compares false.
        broken = [(x.abs() <= limit).logical_not_() for x in g]
        # An average of m and m is m.
        g = [torch.where(bad, old, x) for bad, old, x in zip(broken, m, g, strict=True)]
        _average_(m, g, beta)
        if nesterov:
            n = [x.clone() for x in m]
            _average_(n, g, beta)
        else:
            n = m
        update = _soft_sign(n, tau)
        del g
        moved = [x.to(dtype) for x in weights]
        if weight_decay:
            torch._foreach_add_(update, moved, alpha=weight_decay)
        for u, bad in zip(update, broken, strict=True):
            # Selected, not multiplied: zero times NaN is NaN.
            u.masked_fill_(bad, 0.0)
        torch._foreach_mul_(update, lr)
        for state, values, x, y, u in zip(states, m, weights, moved, update, strict=True):
            seed = None
            if rounding_seed is not None:
                seed = torch.full((), rounding_seed, dtype=torch.int64, device=state.device)
            stored.write_(state, values, seed=seed, first=first)
            first += values.numel()
            # On float32 weights y is x itself.
            x.copy_(y.sub_(u))


def _batches(*columns: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Yield the rows in their order, cut where devices or states' dtypes change and where there are many elements."""
    batch: list[list[Tensor]] = [[] for _ in columns]
    elements = 0
    for row in zip(*columns, strict=True):
        state, elements = row[-1], elements + row[-1].numel()
        last = batch[-1][-1] if batch[-1] else state
        if batch[0] and (elements > _AT_ONCE or (last.device, last.dtype) != (state.device, state.dtype)):
            yield batch
            batch, elements = [[] for _ in columns], state.numel()
        for column, x in zip(batch, row, strict=True):
            column.append(x)
    yield batch


def _average_(old: list[Tensor], new: list[Tensor], beta: float) -> None:
    """Replace ``old`` by ``beta * old + (1 - beta) * new``, exact when both are equal."""
    # lerp rounds the weight to float32 and forms the other as 1 - weight: the smaller one has to be given.
    if beta >= 0.5:
        torch._foreach_lerp_(old, new, 1 - beta)
    else:
        torch._foreach_copy_(old, torch._foreach_lerp(new, old, beta))


def _soft_sign(n: list[Tensor], tau: float) -> list[Tensor]:
    """Return tanh(tau * n), or sign(n) with 0 for what is below the smallest normal number."""
    if tau < math.inf:
        soft = list(torch._foreach_mul(n, tau))
        torch._foreach_tanh_(soft)
        return soft
    # By this power of two the smallest normal number becomes 1, and what is smaller is cut to 0.
    hard = list(torch._foreach_mul(n, 1 / torch.finfo(n[0].dtype).tiny))
    torch._foreach_clamp_min_(hard, -1.0)
    torch._foreach_clamp_max_(hard, 1.0)
    torch._foreach_trunc_(hard)
    return hard
