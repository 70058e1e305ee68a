"""The S3 update over lists of tensors with ``torch._foreach_*``: any device, about ten passes over memory."""

import math

import torch
from torch import Tensor

from s3_megatron.kernels.call import AnyRule, Columns, Rule, SoftRule, Step, check_numbers
from s3_megatron.kernels.examine import examine
from s3_megatron.watch.statistics import LARGEST

# What torch._foreach_* takes and gives.
type Tensors = list[Tensor] | tuple[Tensor, ...]


def s3_step_(columns: Columns, rule: Rule, step: Step) -> None:
    """Move every parameter by one S3 step; for arguments and effects see ``kernels.call``.

    The tensors of one kind may differ in dtype here, but for the states'. Any class of tensors will do.

    Raises:
        S3Error: the lists do not belong together, or a tensor cannot be written; nothing has been written.
    """
    if not columns:
        return
    examine(columns)
    rule, step = numbers(columns, rule, step)
    format = columns.stored()
    assert format is not None, "examined"
    exp_avgs, roots = columns["m"], columns["r"]
    pairs = [format.read_pair(*stored) for stored in zip(exp_avgs, roots, strict=True)]
    old_m, old_r = [m for m, _ in pairs], [r for _, r in pairs]
    dtype = format.computed
    g, moving = gradients(columns, rule, step, dtype)

    m = average(old_m, g, rule.beta1)
    r, b = _next_roots(old_r, torch._foreach_abs(g), rule)
    if rule.nesterov:
        n = average(m, g, rule.beta1)
    else:
        n, b = m, r
    update: Tensors = torch._foreach_div(n, b)
    for u, root in zip(update, b, strict=True):
        # 0/0 where no gradient came yet; and where none comes any more, m and r stop fading at a few units of the
        # smallest denormal, whose ratio would move the weight for ever.
        u.masked_fill_(root < torch.finfo(dtype).tiny, 0.0)
    if rule.bound < math.inf:
        torch._foreach_clamp_min_(update, -rule.bound)
        torch._foreach_clamp_max_(update, rule.bound)

    # From here on broken gradients select the old value; multiplying by zero would write NaN.
    update = [torch.where(ok, u, 0.0) for ok, u in zip(moving, update, strict=True)]
    if step.statistics is not None:
        accumulate_(step.statistics, update, g, step.found_inf)
    first = 0
    for i, ok in enumerate(moving):
        format.write_pair((exp_avgs[i], roots[i]), m[i], r[i], moving=ok, seed=step.seed, first=first)
        first += m[i].numel()
    move_weights(columns, rule, step, update, moving)


def numbers[R: (Rule, SoftRule)](columns: Columns, rule: R, step: Step) -> tuple[R, Step]:
    """Check the numbers in tensors, and return both with these of no dimension: one would make tensors of numbers."""
    check_numbers(columns["weight"][0], rule, step)
    lr = rule.lr.reshape(()) if isinstance(rule.lr, Tensor) else rule.lr
    factor, found_inf = (None if x is None else x.reshape(()) for x in (step.factor, step.found_inf))
    return rule._replace(lr=lr), step._replace(factor=factor, found_inf=found_inf)


def gradients(columns: Columns, rule: AnyRule, step: Step, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients as the update takes them, in ``dtype``, and where they move anything."""
    g = [grad.to(dtype) for grad in columns["gradient"]]
    if step.factor is not None:
        g = [x * step.factor for x in g]
    if rule.maximize:
        g = list(torch._foreach_neg(g))
    # A quarter of the range, or g - m overflows and leaves an infinite m behind; NaN compares false.
    limit = torch.finfo(dtype).max / 4
    moving = [x.abs() <= limit for x in g]
    if step.found_inf is not None:
        moving = [ok & (step.found_inf == 0) for ok in moving]
    return g, moving


def move_weights(columns: Columns, rule: AnyRule, step: Step, update: Tensors, moving: list[Tensor]) -> None:
    """Write weights, and the model's, moved by ``update``, which is 0 where nothing moves and has the dtype of it."""
    models = columns.lists.get("model weight")
    for i, (param, u, ok) in enumerate(zip(columns["weight"], update, moving, strict=True)):
        # Low-precision weights are moved in the state's precision and rounded once.
        x = param.to(u.dtype)
        moved = torch.where(ok, x - rule.lr * (u + rule.weight_decay * x), x)
        param.copy_(moved)
        if models is not None:
            model, found_inf = models[i], step.found_inf
            # A broken coordinate's model weight is its master's all the same; a step that does nothing writes nothing.
            low = moved.to(model.dtype)
            model.copy_(low if found_inf is None else torch.where(found_inf == 0, low, model))


def _next_roots(roots: Tensors, magnitudes: Tensors, rule: Rule) -> tuple[Tensors, Tensors]:
    """Return the new roots r and the look-ahead roots b, neither in place.

    Dividing by ``M = max(r, |g|)`` first keeps both powers in [0, 1], and one of them 1.
    """
    beta2, p = rule.beta2, rule.p
    if beta2 == 0:  # nothing is remembered; below, |g|/M to the p would underflow after one larger gradient
        return magnitudes, magnitudes
    largest = torch._foreach_maximum(roots, magnitudes)
    # 0/0 would make a NaN of an untouched coordinate.
    divisor = [torch.where(x == 0, 1.0, x) for x in largest]
    old = _power(torch._foreach_div(roots, divisor), p)
    new = _power(torch._foreach_div(magnitudes, divisor), p)
    mean = average(old, new, beta2)
    ahead = average(mean, new, beta2)
    return torch._foreach_mul(_root(mean, p), largest), torch._foreach_mul(_root(ahead, p), largest)


def average(old: Tensors, new: Tensors, beta: float) -> Tensors:
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


def accumulate_(statistics: Tensor, updates: Tensors, grads: Tensors, found_inf: Tensor | None = None) -> None:
    """Add this step's statistics (modified in place) without a host synchronisation; in the order of FIELDS."""
    elements = sum(u.numel() for u in updates)
    if not elements:
        return
    pairs = [(u, g) for u, g in zip(updates, grads, strict=True) if u.numel()]
    sums = torch.stack(
        [
            torch.stack([u.abs().sum(dtype=torch.float64) for u, _ in pairs]).sum(),
            # The maximum's place: nothing to add.
            torch.zeros((), dtype=torch.float64, device=statistics.device),
            torch.stack([(u.abs() > 0.9).sum() for u, _ in pairs]).sum().double(),
            torch.stack([((u > 0) & (g > 0) | (u < 0) & (g < 0)).sum() for u, g in pairs]).sum().double(),
            torch.full((), float(elements), dtype=torch.float64, device=statistics.device),
        ]
    )
    statistics += sums if found_inf is None else torch.where(found_inf == 0, sums, 0.0)
    largest = torch.stack([u.abs().max() for u, _ in pairs]).max()
    statistics[LARGEST] = torch.maximum(statistics[LARGEST], largest.to(torch.float64))
