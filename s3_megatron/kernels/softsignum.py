"""The SoftSignum update over lists of tensors with ``torch._foreach_*``: any device, in many passes over memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from s3_megatron.kernels.call import Columns, SoftRule, Step
from s3_megatron.kernels.examine import examine
from s3_megatron.kernels.foreach import Tensors, accumulate_, average, gradients, move_weights, numbers
from s3_megatron.kernels.formats import PLAIN

# Elements of the lists that a pass takes at once: more would only make its copies larger.
_AT_ONCE = 1 << 24


def foreach_(columns: Columns, rule: SoftRule, step: Step) -> None:
    """Move every parameter by one SoftSignum step; for arguments and effects see ``kernels.call``.

        m <- beta * m + (1 - beta) * g
        n  = m, or with nesterov beta * m + (1 - beta) * g
        x <- x - lr * (tanh(tau * n) + weight_decay * x)

    The tensors of one kind may differ in dtype here, but for the states'. It takes room for 3.3 times the gradients in
    float32, of 2^24 elements at once, or 4.3 times a tensor of more.

    Raises:
        S3Error: the lists do not belong together, or a tensor cannot be written; nothing has been written.
    """
    if not columns:
        return
    examine(columns)
    rule, step = numbers(columns, rule, step)
    first = 0
    for batch in _batches(columns):
        _move(batch, rule, step, first)
        first += sum(map(Tensor.numel, batch["m"]))


def _move(columns: Columns, rule: SoftRule, step: Step, first: int) -> None:
    """Move one batch, whose first element has the number ``first``."""
    states = columns["m"]
    stored = PLAIN[states[0].dtype]
    g, moving = gradients(columns, rule, step, stored.computed)
    m = average([stored.read(state) for state in states], g, rule.beta)
    n = average(m, g, rule.beta) if rule.nesterov else m
    update = _signs(n) if rule.hard else list(torch._foreach_mul(n, rule.tau))
    if not rule.hard:
        torch._foreach_tanh_(update)
    del n
    for u, ok in zip(update, moving, strict=True):
        # Selected, not multiplied: zero times NaN is NaN.
        u.masked_fill_(ok.logical_not(), 0.0)
    if step.statistics is not None:
        accumulate_(step.statistics, update, g, step.found_inf)
    for state, values, ok in zip(states, m, moving, strict=True):
        stored.write_(state, values, moving=ok, seed=step.seed, first=first)
        first += values.numel()
    move_weights(columns, rule, step, update, moving)


def _batches(columns: Columns) -> Iterator[Columns]:
    """Yield the rows in their order, cut where there are many elements."""
    batch: list[tuple[Tensor, ...]] = []
    elements = 0
    for row in columns.rows():
        elements += row[0].numel()
        if batch and elements > _AT_ONCE:
            yield columns.of(batch)
            batch, elements = [], row[0].numel()
        batch.append(row)
    yield columns.of(batch)


def _signs(n: Tensors) -> list[Tensor]:
    """Return sign(n), 0 for what is below the smallest normal number."""
    # By this power of two the smallest normal number becomes 1, and what is smaller is cut to 0.
    hard = list(torch._foreach_mul(n, 1 / torch.finfo(n[0].dtype).tiny))
    torch._foreach_clamp_min_(hard, -1.0)
    torch._foreach_clamp_max_(hard, 1.0)
    torch._foreach_trunc_(hard)
    return hard
