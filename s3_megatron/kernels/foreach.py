"""The S3 update over lists of tensors with ``torch._foreach_*``: any device, about ten passes over memory."""

import torch
from torch import Tensor

# What torch._foreach_* takes and gives.
type Tensors = list[Tensor] | tuple[Tensor, ...]


def s3_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_roots: Tensors,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    p: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool = False,
    statistics: Tensor | None = None,
) -> None:
    """Move every parameter by one S3 step.

    The state is m and the root ``r = s^(1/p)`` (SPEC section 2): the root has the range of the gradient itself,
    where float32 ``|g|^3`` loses gradients under 6e-13 and overflows at 7e12.

    Args:
        params: weights, any floating dtype, all on one device (modified in place).
        grads: gradients of the same shapes; never modified. A coordinate whose gradient is not finite (or beyond
            half the range of the state's dtype) keeps its weight, m and r bit for bit.
        exp_avgs: m, float32 or float64 (modified in place).
        exp_avg_roots: r, same dtype as m (modified in place).
        lr: learning rate; a 0-dim tensor is used without a host synchronisation.
        beta1: decay of m, in [0, 1).
        beta2: decay of s, in [0, 1). If it equals beta1 the update is clamped to [-1, 1]: |n/b| < 1 in exact
            arithmetic, and float32 rounding reaches 1 + 1.1e-6. Betas apart have a larger bound and no clamp.
        p: exponent of the denominator, >= 1.
        weight_decay: decoupled, ``x <- x - lr * (update + weight_decay * x)``.
        nesterov: look ahead by one step, as Algorithm 1 does.
        maximize: ascend instead of descending; the decay still shrinks.
        statistics: optional float64 tensor of two elements, [sum of |update|, max of |update|], to which this call
            adds its own (modified in place).
    """
    dtype = exp_avgs[0].dtype
    g = [grad.to(dtype) for grad in grads]
    if maximize:
        g = list(torch._foreach_neg(g))
    # Half the range, or g - m overflows and leaves an infinite m behind; NaN compares false.
    limit = torch.finfo(dtype).max / 2
    finite = [x.abs() <= limit for x in g]

    m = _average(exp_avgs, g, beta1)
    r, b = _next_roots(exp_avg_roots, torch._foreach_abs(g), beta2=beta2, p=p)
    if nesterov:
        n = _average(m, g, beta1)
    else:
        n, b = m, r
    update: Tensors = torch._foreach_div(n, b)
    for u, root in zip(update, b, strict=True):
        # 0/0 where no gradient came yet; and where none comes any more, m and r stop fading at a few units of the
        # smallest denormal, whose ratio would move the weight for ever.
        u.masked_fill_(root < torch.finfo(dtype).tiny, 0.0)
    if beta1 == beta2:
        torch._foreach_clamp_min_(update, -1.0)
        torch._foreach_clamp_max_(update, 1.0)

    # From here on non-finite gradients select the old value; multiplying by zero would write NaN.
    update = [torch.where(ok, u, 0.0) for ok, u in zip(finite, update, strict=True)]
    if statistics is not None:
        _accumulate(statistics, update)
    for i, ok in enumerate(finite):
        exp_avgs[i].copy_(torch.where(ok, m[i], exp_avgs[i]))
        exp_avg_roots[i].copy_(torch.where(ok, r[i], exp_avg_roots[i]))
        # Low-precision weights are moved in the state's precision and rounded once.
        x = params[i].to(dtype)
        moved = x - lr * (update[i] + weight_decay * x)
        params[i].copy_(torch.where(ok, moved, x))


def _next_roots(roots: Tensors, magnitudes: Tensors, *, beta2: float, p: float) -> tuple[Tensors, Tensors]:
    """Return the new roots r and the look-ahead roots b, neither in place.

    Dividing by ``M = max(r, |g|)`` first keeps both powers in [0, 1], and one of them 1.
    """
    if beta2 == 0:  # nothing is remembered; below, |g|/M to the p would underflow after one larger gradient
        return magnitudes, magnitudes
    largest = torch._foreach_maximum(roots, magnitudes)
    # 0/0 would make a NaN of an untouched coordinate.
    divisor = [torch.where(x == 0, 1.0, x) for x in largest]
    old = _power(torch._foreach_div(roots, divisor), p)
    new = _power(torch._foreach_div(magnitudes, divisor), p)
    mean = _average(old, new, beta2)
    ahead = _average(mean, new, beta2)
    return torch._foreach_mul(_root(mean, p), largest), torch._foreach_mul(_root(ahead, p), largest)


def _average(old: Tensors, new: Tensors, beta: float) -> Tensors:
    """Return ``beta * old + (1 - beta) * new``, exact when old and new are equal."""
    # lerp rounds the weight to float32 and forms the other as 1 - weight: the smaller one has to be given.
    return torch._foreach_lerp(old, new, 1 - beta) if beta >= 0.5 else torch._foreach_lerp(new, old, beta)


def _power(tensors: Tensors, p: float) -> Tensors:
    """Raise non-negative tensors to the power p, without pow where p is small and whole."""
    if p == 1:
        return tensors
    square = torch._foreach_mul(tensors, tensors)
    if p == 2:
        return square
    return torch._foreach_mul(square, tensors) if p == 3 else torch._foreach_pow(tensors, p)


def _root(tensors: Tensors, p: float) -> Tensors:
    """Take the p-th root of non-negative tensors."""
    if p == 1:
        return tensors
    return torch._foreach_sqrt(tensors) if p == 2 else torch._foreach_pow(tensors, 1 / p)


def _accumulate(statistics: Tensor, updates: Tensors) -> None:
    """Add sum and maximum of |update| to ``statistics`` (modified in place), without a host synchronisation."""
    magnitudes = [u.abs() for u in updates if u.numel()]
    if not magnitudes:
        return
    total = torch.stack([x.sum(dtype=torch.float64) for x in magnitudes]).sum()
    largest = torch.stack([x.max() for x in magnitudes]).max()
    statistics[0] += total
    statistics[1] = torch.maximum(statistics[1], largest.to(torch.float64))
